"""Writes one partition chunk by chunk, with a checksum for each, in memory of one chunk."""

import os
from pathlib import Path

from gearfall.core.checkpoint.manifest import PartitionEntry, checksum

_ZEROS = memoryview(bytes(4096))


class PartitionWriter:
    """Appends bytes to a partition file, or, without a directory, computes its checksums alone.

    Use as a context manager; the file is synced by `finish`.
    """

    def __init__(
        self, directory: Path | None, file: str, size_bytes: int, chunk_bytes: int
    ) -> None:
        """Reserve `size_bytes` on disk: OSError at once if they are not to be had."""
        self._entry = PartitionEntry(file, size_bytes, chunk_bytes, ())
        self._buffer = bytearray(chunk_bytes)
        self._filled = 0
        self._written_bytes = 0
        self._checksums: list[str] = []
        self._fd = -1 if directory is None else _create(directory / file, size_bytes)

    def __enter__(self) -> "PartitionWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def end_bytes(self) -> int:
        """Bytes appended so far."""
        return self._written_bytes + self._filled

    def append(self, content: memoryview) -> None:
        """Append bytes."""
        while content:
            count = min(len(content), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = content[:count]
            self._filled += count
            content = content[count:]
            if self._filled == len(self._buffer):
                self._flush()

    def pad_to(self, offset_bytes: int) -> None:
        """Append zeros up to an offset."""
        while self.end_bytes < offset_bytes:
            self.append(_ZEROS[: offset_bytes - self.end_bytes])

    def finish(self) -> PartitionEntry:
        """Pad to the promised size, sync the file and return its entry."""
        self.pad_to(self._entry.size_bytes)
        if self._filled:
            self._flush()
        if self._fd >= 0:
            os.fsync(self._fd)
        entry = self._entry
        return PartitionEntry(
            entry.file, entry.size_bytes, entry.chunk_bytes, tuple(self._checksums)
        )

    def _flush(self) -> None:
        chunk = memoryview(self._buffer)[: self._filled]
        self._checksums.append(checksum(chunk))
        if self._fd >= 0:
            _write_all(self._fd, chunk)
        self._written_bytes += self._filled
        self._filled = 0


def _create(path: Path, size_bytes: int) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, content: memoryview) -> None:
    while content:
        content = content[os.write(fd, content) :]
