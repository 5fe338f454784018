"""The canaries of a store's models: computed once, kept beside the checkpoint."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from gearfall.core.errors import CorruptCheckpoint, InvalidRequest, Unavailable
from gearfall.core.generation.canary import MAX_CANARY_BYTES, Canary, canary_bytes, parse_canary
from gearfall.core.ids import ModelName
from services.store.models.canary_process import CanaryRequest
from services.store.tiers.stored_model import StoredModel

CANARY_FILE = "canary.json"
"""Beside the manifest and, like the origin, no part of what the digest covers: bytes that changed
together with their checksums are still held against the answer recorded for the old ones."""

ComputeCanary = Callable[[CanaryRequest, int], Awaitable[Canary]]
_log = logging.getLogger(__name__)


class Canaries:
    """Records and hands out canaries; one computation a model, however many ask."""

    def __init__(
        self, compute: ComputeCanary, on_changed: Callable[[], None] = lambda: None
    ) -> None:
        """`on_changed` is called when another set of models is `preparing`."""
        self._compute = compute
        self._on_changed = on_changed
        self._work: dict[str, asyncio.Task[bytes]] = {}

    @property
    def preparing(self) -> tuple[ModelName, ...]:
        """Models whose canary is being computed."""
        return tuple(sorted(ModelName(Path(directory).name) for directory in self._work))

    def record(self, model: StoredModel) -> None:
        """Begin to compute a new model's canary from its source, unless it has one."""
        if not (model.directory / CANARY_FILE).exists():
            self._begin(model, Path(model.source))

    async def read(self, model: StoredModel) -> bytes:
        """Return a model's canary as JSON, once there is one.

        One that was never recorded (the store died first, the bytes came from another node) is
        computed from the checkpoint itself. Raises InvalidRequest for a LoRA adapter, and when
        transformers can't run the model, CorruptCheckpoint for a file that is no canary.
        """
        if model.manifest.adapter is not None:
            raise InvalidRequest(f"{model.name!r} is a LoRA adapter: it has no canary of its own")
        work = self._work.get(str(model.directory))
        if work is None:
            found = await self.find(model)
            if found is not None:
                return found
            work = self._begin(model, model.directory)
        return await asyncio.shield(work)

    async def find(self, model: StoredModel) -> bytes | None:
        """Return the canary that is kept with a model, None when none is. Raises as `read`."""
        return await asyncio.to_thread(_read_file, model.directory / CANARY_FILE)

    async def stop(self) -> None:
        """Give up what is under way. Idempotent."""
        for work in tuple(self._work.values()):
            work.cancel()
            await asyncio.wait({work})

    def _begin(self, model: StoredModel, source: Path) -> asyncio.Task[bytes]:
        key = str(model.directory)
        known = self._work.get(key)
        if known is not None:
            return known
        # Opened now: whatever comes to bear this name later, the canary goes to this checkpoint.
        directory_fd = os.open(model.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        work = asyncio.create_task(self._run(model, source, directory_fd), name=f"canary-{key}")
        self._work[key] = work
        work.add_done_callback(lambda done: self._end(key, done, directory_fd))
        self._on_changed()
        return work

    def _end(self, key: str, work: asyncio.Task[bytes], directory_fd: int) -> None:
        os.close(directory_fd)
        self._work.pop(key, None)
        self._on_changed()
        if not work.cancelled() and isinstance(error := work.exception(), Exception):
            _log.warning("no canary recorded", extra={"path": key, "error": str(error)})

    async def _run(self, model: StoredModel, source: Path, directory_fd: int) -> bytes:
        content = canary_bytes(await self._ask(model, source))
        try:
            await asyncio.to_thread(_write_file, directory_fd, content)
        except OSError as error:
            raise Unavailable(f"the canary of {model.name!r} can't be kept: {error}") from error
        _log.info("canary recorded", extra={"model": model.name})
        return content

    async def _ask(self, model: StoredModel, source: Path) -> Canary:
        facts, size_bytes = model.manifest.model, model.manifest.size_bytes
        request = CanaryRequest(
            str(source), facts.vocabulary_size, facts.bos_token_id, facts.context_tokens
        )
        try:
            return await self._compute(request, size_bytes)
        except InvalidRequest as error:
            raise InvalidRequest(f"model {model.name!r}: {error.message}") from error


def _read_file(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CANARY_BYTES + 1)
        parse_canary(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"{path.parent.name}: the canary can't be read: {error}") from error
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{path.parent.name}: {error.message}") from error
    return content


def _write_file(directory_fd: int, content: bytes) -> None:
    temporary = f".{CANARY_FILE}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o644, dir_fd=directory_fd)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, CANARY_FILE, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    os.fsync(directory_fd)
