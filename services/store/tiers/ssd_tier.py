"""The SSD tier: converted checkpoints as directories, each there whole or not at all.

DATA_DIR/models/<name>/          manifest.json, partition-*.bin, small files, origin.json
DATA_DIR/models/.incoming-*      being written; a crash's leftover is removed at the next start
DATA_DIR/models/.trash-*         being removed
DATA_DIR/lock                    held by the one store that may write here

Everything here blocks: the service calls it in threads.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from gearfall.checkpoint.adapter_source import open_adapter
from gearfall.checkpoint.conversion import Report, convert
from gearfall.checkpoint.directory import disk_errors, sync_directory, write_file
from gearfall.checkpoint.source import Source, open_source
from gearfall.core.checkpoint.manifest import Manifest, manifest_bytes
from gearfall.core.errors import Conflict, CorruptCheckpoint, GearfallError, NotFound
from gearfall.core.ids import ModelName, parse_name
from services.store.tiers.stored_model import ORIGIN_FILE, StoredModel, open_stored, origin_bytes

Admit = Callable[[int], None]
"""Told the bytes that a model is going to take; raises when there is no room."""
_log = logging.getLogger(__name__)


class SsdTier:
    """Owns the models directory. `models` and `broken` together name everything registered here."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._models_dir = data_dir / "models"
        self._lock_fd = -1
        self.models: dict[ModelName, StoredModel] = {}
        self.broken: dict[ModelName, CorruptCheckpoint] = {}
        """Registered models that can't be loaded until they are registered again or removed."""

    def open(self) -> None:
        """Lock the directory, remove leftovers, find the models again.

        Raises Conflict if another store has it open.
        """
        self._models_dir.mkdir(parents=True, exist_ok=True)
        self._lock_fd = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise Conflict(f"another store uses {self._data_dir}") from None
        for entry in sorted(self._models_dir.iterdir()):
            if entry.name.startswith("."):
                remove_tree(entry)
            else:
                self._find(entry)

    def close(self) -> None:
        """Release the directory. Idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def get(self, name: ModelName) -> StoredModel:
        """Return a model that can be loaded. Raises NotFound, or CorruptCheckpoint if broken."""
        if name in self.broken:
            raise CorruptCheckpoint(self.broken[name].message)
        if name not in self.models:
            raise NotFound(f"model {name!r} is not registered on this node", param="model")
        return self.models[name]

    def register(
        self,
        name: ModelName,
        path: str,
        report: Report,
        admit: Admit = lambda _: None,
        *,
        base: StoredModel | None = None,
    ) -> StoredModel:
        """Check and convert a source directory; return at once what is there with the same bytes.

        `admit` is asked for room before anything is written; `base` is the model that a LoRA
        adapter belongs to. Raises InvalidRequest,
        CorruptCheckpoint, Conflict (other bytes under this name) or Overloaded (no room); nothing
        is left behind then.
        """
        with _open(path, base) as source, disk_errors():
            known = self.models.get(name)
            if known is not None:
                _check_same(known, convert(source, None, report))
                return known
            admit(sum(os.fstat(file.fd).st_size for file in source.files))
            with self.incoming(name) as incoming:
                convert(source, incoming, report)
                write_file(incoming / ORIGIN_FILE, _origin(source, base))
                return self.install(name, incoming)

    def mark_broken(self, name: ModelName, error: CorruptCheckpoint) -> None:
        """Remember that a model's bytes failed their check; registering again converts anew."""
        self.models.pop(name, None)
        self.broken[name] = error

    def remove(self, name: ModelName) -> None:
        """Forget a model at once, then remove its files. Idempotent."""
        with _removed_at_end() as trash:
            self.set_aside(name, trash)

    def set_aside(self, name: ModelName, trash: list[Path]) -> None:
        """Forget a model at once; its files wait in `trash` to be removed, also if it raises."""
        self.models.pop(name, None)
        self.broken.pop(name, None)
        with disk_errors():
            self._move_out(name, trash)

    def space(self) -> tuple[int, int]:
        """Return the file system's capacity and free space in bytes."""
        usage = shutil.disk_usage(self._models_dir)
        return usage.total, usage.free

    @contextlib.contextmanager
    def incoming(self, name: ModelName) -> Iterator[Path]:
        """Give an empty directory to write a model into; removed at the end unless installed."""
        with disk_errors():
            incoming = Path(tempfile.mkdtemp(dir=self._models_dir, prefix=f".incoming-{name}-"))
            try:
                yield incoming
            finally:
                remove_tree(incoming)

    def install(self, name: ModelName, incoming: Path) -> StoredModel:
        """Make a whole model of an incoming directory, durably, in place of what was there."""
        incoming.chmod(0o755)
        with _removed_at_end() as trash:
            self._move_out(name, trash)
        sync_directory(incoming)
        incoming.rename(self._models_dir / name)
        sync_directory(self._models_dir)
        model = open_stored(name, self._models_dir / name)
        self.broken.pop(name, None)
        self.models[name] = model
        return model

    def _move_out(self, name: ModelName, trash: list[Path]) -> None:
        if not (self._models_dir / name).exists():
            return
        place = Path(tempfile.mkdtemp(dir=self._models_dir, prefix=f".trash-{name}-"))
        try:
            (self._models_dir / name).rename(place / name)
        finally:
            # Not before: what is in there may be removed at any time.
            trash.append(place)
        sync_directory(self._models_dir)

    def _find(self, directory: Path) -> None:
        try:
            name = ModelName(parse_name(directory.name, param="name"))
        except GearfallError:
            _log.warning("not a model directory", extra={"path": str(directory)})
            return
        try:
            self.models[name] = open_stored(name, directory)
        except CorruptCheckpoint as error:
            _log.exception("a registered model is broken", extra={"model": name})
            self.broken[name] = error


def _open(path: str, base: StoredModel | None) -> AbstractContextManager[Source]:
    if base is None:
        return open_source(path)
    return open_adapter(path, base.manifest, base.digest)


def _origin(source: Source, base: StoredModel | None) -> bytes:
    return origin_bytes(str(source.path), "" if base is None else base.name)


def _check_same(known: StoredModel, found: Manifest) -> None:
    """Same bytes from another copy of the source are the same model."""
    if manifest_bytes(replace(found, source_revision=known.manifest.source_revision)) != (
        known.manifest_json
    ):
        raise Conflict(
            f"model {known.name!r} is registered with other bytes: remove it first", param="name"
        )


def remove_tree(path: Path) -> None:
    """Remove a directory or a file as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _removed_at_end() -> Iterator[list[Path]]:
    trash: list[Path] = []
    try:
        yield trash
    finally:
        for place in trash:
            remove_tree(place)
