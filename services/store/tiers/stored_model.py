"""What a directory that holds a model says about it, checked when it is opened."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from gearfall.checkpoint.reading import read_limited
from gearfall.core.checkpoint.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    Manifest,
    checksum,
    manifest_digest,
    parse_manifest,
)
from gearfall.core.errors import CorruptCheckpoint, NotFound
from gearfall.core.ids import ModelName

ORIGIN_FILE = "origin.json"
_MAX_ORIGIN_BYTES = 64 * 1024


class _Origin(msgspec.Struct, omit_defaults=True):
    source: str
    base: str = ""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A checkpoint whose manifest was checked; its chunks, if they are here, are not yet."""

    name: ModelName
    directory: Path
    manifest: Manifest
    manifest_json: bytes
    digest: str
    source: str
    """Directory or URL it was registered from."""
    base: str = ""
    """Of a LoRA adapter: the registered model that it belongs to."""

    def partition_path(self, index: int) -> Path:
        """Path of one partition's file."""
        return self.directory / self.manifest.partitions[index].file

    def read_file(self, file: str) -> bytes:
        """Return a small file that the manifest lists, checked against its checksum.

        Raises NotFound for any other name, CorruptCheckpoint when it is not what it was.
        """
        entry = self.manifest.file(file)
        if entry is None:
            raise NotFound(f"model {self.name!r} has no file {file[:128]!r}", param="file")
        content = read_limited(self.directory, entry.name, entry.size_bytes)
        if len(content) != entry.size_bytes or checksum(content) != entry.checksum:
            raise CorruptCheckpoint(f"{self.name}/{file} is not what its manifest says")
        return content


def origin_bytes(source: str, base: str = "") -> bytes:
    """Return what the origin file says of a model, or of an adapter of `base`, from `source`."""
    return msgspec.json.encode(_Origin(source, base))


def open_stored(name: ModelName, directory: Path, *, has_partitions: bool = True) -> StoredModel:
    """Read and check what a directory says. Raises CorruptCheckpoint."""
    try:
        content = read_limited(directory, MANIFEST_FILE, MAX_MANIFEST_BYTES)
        manifest = parse_manifest(content)
        for partition in manifest.partitions if has_partitions else ():
            if (directory / partition.file).stat().st_size != partition.size_bytes:
                raise CorruptCheckpoint(
                    f"{name}/{partition.file} is not as long as its manifest says"
                )
        text = read_limited(directory, ORIGIN_FILE, _MAX_ORIGIN_BYTES)
        origin = msgspec.json.decode(text, type=_Origin)
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name} cannot be read: {error}") from error
    digest = manifest_digest(content)
    if (manifest.adapter is None) != (origin.base == ""):
        raise CorruptCheckpoint(f"{name} is an adapter or has a base, not both")
    return StoredModel(name, directory, manifest, content, digest, origin.source, origin.base)
