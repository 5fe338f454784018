"""A converted checkpoint on disk: found, its manifest checked, its files opened with care."""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gearfall.core.checkpoint.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    checksum,
    manifest_digest,
    parse_manifest,
)
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory whose manifest is sound; what the manifest speaks of was not read yet."""

    directory: Path
    manifest: Manifest
    digest: str

    @contextlib.contextmanager
    def open_partitions(self) -> Iterator[tuple[int, ...]]:
        """Open every partition for reading. Raises CorruptCheckpoint if one can't be whole."""
        with contextlib.ExitStack() as stack:
            fds = []
            for partition in self.manifest.partitions:
                fds.append(open_regular(self.directory, partition.file))
                stack.callback(os.close, fds[-1])
                found_bytes = os.fstat(fds[-1]).st_size
                if found_bytes != partition.size_bytes:
                    raise CorruptCheckpoint(
                        f"{partition.file} has {found_bytes} bytes, not {partition.size_bytes}"
                    )
            yield tuple(fds)

    def read_file(self, entry: FileEntry) -> bytes:
        """Return a small file. Raises CorruptCheckpoint if it is not what the manifest says."""
        content = read_limited(self.directory, entry.name, entry.size_bytes)
        if len(content) != entry.size_bytes or checksum(content) != entry.checksum:
            raise CorruptCheckpoint(f"{entry.name} is not what the manifest says")
        return content


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check the manifest in a directory.

    Raises InvalidRequest where there is no checkpoint, CorruptCheckpoint where it is unsound.
    """
    if not path.is_dir():
        raise InvalidRequest(f"{path} is not a directory", param="path")
    if not os.path.lexists(path / MANIFEST_FILE):
        raise InvalidRequest(f"{path} is no checkpoint: it has no {MANIFEST_FILE}", param="path")
    content = read_limited(path, MANIFEST_FILE, MAX_MANIFEST_BYTES)
    return Checkpoint(path, parse_manifest(content), manifest_digest(content))


def read_limited(directory: Path, name: str, max_bytes: int) -> bytes:
    """Read a regular file. Raises CorruptCheckpoint, unread, for one of more than `max_bytes`."""
    with os.fdopen(open_regular(directory, name), "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > max_bytes:
            raise CorruptCheckpoint(f"{name} has {size_bytes} bytes, more than {max_bytes}")
        try:
            return file.read(size_bytes)
        except OSError as error:
            raise CorruptCheckpoint(f"{name} cannot be read: {error.strerror}") from None


def open_regular(directory: Path, name: str) -> int:
    """Open a regular file, no link. Raises CorruptCheckpoint; the caller closes the descriptor."""
    try:
        # Without O_NONBLOCK a pipe would block the open.
        fd = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CorruptCheckpoint(f"{name} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptCheckpoint(f"{name} is not a regular file")
    return fd
