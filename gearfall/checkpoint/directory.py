"""Directories that are there whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gearfall.core.errors import Conflict, InvalidRequest, Overloaded, Unavailable

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory beside `path` to fill; make it `path` when the block ends well.

    After an error nothing is left behind. Raises Conflict when `path` is there, InvalidRequest
    when it can't be made, Overloaded when the disk is full, Unavailable when it fails.
    """
    target = path.absolute()
    if os.path.lexists(target):
        raise Conflict(f"{path} is there already: remove it first")
    try:
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".incoming-{target.name}-"))
    except OSError as error:
        raise InvalidRequest(f"{path} can't be made: {error.strerror}") from None
    try:
        with disk_errors():
            yield temporary
            sync_directory(temporary)
            temporary.chmod(0o755)
            temporary.rename(target)
            sync_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raise Overloaded for a full disk, Unavailable for one that fails."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise Overloaded(f"the disk has no room left: {error.strerror}") from error
        raise Unavailable(f"the disk failed: {error}") from error


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, content: bytes) -> None:
    """Create a file with this content, synced. Raises OSError."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
