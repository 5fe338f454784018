"""Models that this store can bring but need not hold: what is known of each without its chunks.

DATA_DIR/remote/<name>/    manifest.json, small files, origin.json (its URL), canary.json if there

Everything here blocks: the service calls it in threads.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gearfall.checkpoint.directory import disk_errors, sync_directory, write_file
from gearfall.core.checkpoint.manifest import MANIFEST_FILE
from gearfall.core.errors import GearfallError
from gearfall.core.ids import ModelName, parse_name
from gearfall.infra.net.remote import is_url
from services.store.models.canaries import CANARY_FILE
from services.store.tiers.stored_model import ORIGIN_FILE, StoredModel, open_stored, origin_bytes

_log = logging.getLogger(__name__)


class Catalogue:
    """Owns the directory. An entry is there whole or not at all."""

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir / "remote"
        self.models: dict[ModelName, StoredModel] = {}

    def open(self) -> None:
        """Find the entries again; what was half written is removed, what is unsound is logged."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for entry in sorted(self._directory.iterdir()):
            try:
                if entry.name.startswith("."):
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    name = ModelName(parse_name(entry.name, param="name"))
                    self.models[name] = open_stored(name, entry, has_partitions=False)
            except GearfallError as error:
                _log.warning("not an entry", extra={"path": str(entry), "error": error.message})

    def put(
        self,
        name: ModelName,
        manifest_json: bytes,
        files: Mapping[str, bytes],
        url: str,
        base: str = "",
    ) -> StoredModel:
        """Keep what is known of a model, durably. Raises Overloaded when the disk is full."""
        with disk_errors():
            incoming = Path(tempfile.mkdtemp(dir=self._directory, prefix=f".incoming-{name}-"))
            try:
                for file, content in files.items():
                    write_file(incoming / file, content)
                write_file(incoming / MANIFEST_FILE, manifest_json)
                write_file(incoming / ORIGIN_FILE, origin_bytes(url, base))
                return self._install(name, incoming)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)

    def keep(self, stored: StoredModel) -> StoredModel | None:
        """Keep what is known of a model that leaves the SSD tier, if it came from a URL."""
        if not is_url(stored.source):
            return None
        names = [*(entry.name for entry in stored.manifest.files), CANARY_FILE]
        found = [name for name in names if (stored.directory / name).exists()]
        files = {name: (stored.directory / name).read_bytes() for name in found}
        return self.put(stored.name, stored.manifest_json, files, stored.source, stored.base)

    def remove(self, name: ModelName) -> None:
        """Forget a model. Idempotent."""
        self.models.pop(name, None)
        shutil.rmtree(self._directory / name, ignore_errors=True)

    def _install(self, name: ModelName, incoming: Path) -> StoredModel:
        sync_directory(incoming)
        model = open_stored(name, incoming, has_partitions=False)
        shutil.rmtree(self._directory / name, ignore_errors=True)
        incoming.rename(self._directory / name)
        sync_directory(self._directory)
        self.models[name] = replace(model, directory=self._directory / name)
        return self.models[name]
