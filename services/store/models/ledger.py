"""Which models this store has published, and in which life of cluster state.

A model that is here and not in cluster state was either removed while this store was down, or
cluster state lost its memory. State that was made anew has another incarnation: only in the one
that a model was published in does its absence mean that somebody removed it. State that was
restored from a backup bears the name of its old life and a lower revision than this store has
seen: that one is no witness either.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from gearfall.checkpoint.directory import disk_errors, sync_directory
from gearfall.core.ids import ModelName


class _Content(msgspec.Struct):
    incarnation: str = ""
    models: dict[str, str] = {}
    revision: int = 0


class Ledger:
    """Owns DATA_DIR/published.json. Blocks; small enough for the event loop."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "published.json"
        self._content = _Content()

    def open(self) -> None:
        """Read it; one that is damaged or missing counts as empty, which removes nothing."""
        try:
            self._content = msgspec.json.decode(self._path.read_bytes(), type=_Content)
        except (OSError, msgspec.MsgspecError):
            self._content = _Content()

    @property
    def incarnation(self) -> str:
        """Life of cluster state in which all that stands here was published."""
        return self._content.incarnation

    @property
    def revision(self) -> int:
        """Highest of that life that was noted; 0 when unknown."""
        return self._content.revision

    def has(self, incarnation: str, model: ModelName, digest: str) -> bool:
        """Whether these bytes were published in this life of cluster state."""
        return incarnation == self._content.incarnation and (
            self._content.models.get(model) == digest
        )

    def note(self, incarnation: str, models: Mapping[ModelName, str], revision: int) -> None:
        """Note digests of models that state had in this life, and a revision of it, durably.

        Writes nothing that stands there already. Raises Overloaded or Unavailable when the disk
        fails.
        """
        known = self._content if incarnation == self.incarnation else _Content(incarnation)
        merged = known.models | {str(name): digest for name, digest in models.items()}
        content = _Content(incarnation, merged, max(known.revision, revision))
        if content != self._content:
            self._write(content)

    def remove(self, model: ModelName) -> None:
        """Forget a model, durably. Idempotent."""
        if model in self._content.models:
            left = {name: each for name, each in self._content.models.items() if name != model}
            self._write(_Content(self.incarnation, left, self.revision))

    def _write(self, content: _Content) -> None:
        temporary = self._path.with_suffix(".new")
        with disk_errors():
            with temporary.open("wb") as file:
                file.write(msgspec.json.encode(content))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path)
            sync_directory(self._path.parent)
        self._content = content
