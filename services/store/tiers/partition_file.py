"""One partition's file while its chunks arrive, in any order."""

import errno
import os
from pathlib import Path

from gearfall.core.checkpoint.manifest import PAGE_BYTES


class PartitionFile:
    """Written past the page cache where the file system has that; use as a context manager."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Reserve `size_bytes` on disk: OSError at once if they are not to be had."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o644)
        try:
            os.posix_fallocate(self._fd, 0, size_bytes)
            self._direct_fd = _open_direct(path)
        except OSError:
            os.close(self._fd)
            raise

    def __enter__(self) -> "PartitionFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if self._direct_fd >= 0:
            os.close(self._direct_fd)

    def write(self, offset_bytes: int, content: memoryview) -> None:
        """Write a chunk: `content` lies on a page, offset and length are multiples of one."""
        assert offset_bytes % PAGE_BYTES == len(content) % PAGE_BYTES == 0
        fd = self._direct_fd if self._direct_fd >= 0 else self._fd
        done = 0
        while done < len(content):
            # A short write ends on a block's border, so that what is left stays aligned.
            done += os.pwrite(fd, content[done:], offset_bytes + done)

    def finish(self) -> None:
        """Make it durable."""
        os.fsync(self._fd)


def _open_direct(path: Path) -> int:
    """Return a descriptor for direct writes, -1 where the file system has none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return -1
        raise
