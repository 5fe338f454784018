"""The native extension's typed face: chunked reads, the page cache, devices.

Errors arrive in gearfall's words: a range that its file does not hold is a `CorruptCheckpoint`
(its cause tells whether it lay outside from the start or the file shrank meanwhile), a driver that
refuses is `Unavailable`, a failed system call is an `OSError` with its errno, and an argument that
no file could satisfy is a `ValueError`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash
from typing_extensions import Buffer

from gearfall.core.errors import CorruptCheckpoint, Unavailable

try:
    from gearfall import _cuda_ext
except ImportError as error:
    raise ImportError(
        "gearfall's native extension is not built: install the package with pip or `make venv`"
    ) from error

DEFAULT_CHUNK_BYTES = 4 << 20
"""Large enough for a direct read at full device speed, small enough for tiers to overlap."""

Digest = Callable[[memoryview], int]


def read_chunks(
    path: str | os.PathLike[str],
    *,
    offset_bytes: int,
    size_bytes: int,
    destination: Buffer,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    threads: int = 4,
    direct: bool = False,
    digest: Digest = xxhash.xxh3_64_intdigest,
) -> list[int]:
    """Read a range of a file into the front of `destination`; return one digest for each chunk.

    `threads` readers (1 to 64) take the chunks in file order and digest each one right after its
    read; neither holds the interpreter lock. Where `direct` is asked for, it is used if the file
    system has it and `offset_bytes`, `chunk_bytes` and the destination's address are multiples of
    4096; a tail always goes through the page cache. All bounds are checked before the first read.
    After an error the destination's content is undefined.
    """
    with _gearfall_errors():
        return _cuda_ext.read_chunks(
            os.fsencode(path),
            _to_int64(offset_bytes),
            _to_int64(size_bytes),
            _view_bytes(destination),
            _to_int64(chunk_bytes),
            threads,
            direct,
            digest,
        )


def page_cached_bytes(
    path: str | os.PathLike[str], *, offset_bytes: int = 0, size_bytes: int | None = None
) -> int:
    """Return how many bytes of a range (by default to the end) the page cache holds.

    Direct reads are faster where little is cached, buffered ones where much is. The kernel answers
    truly only for files that the caller owns or may write; others look fully cached.
    """
    size = Path(path).stat().st_size - offset_bytes if size_bytes is None else size_bytes
    with _gearfall_errors():
        return _cuda_ext.page_cached_bytes(
            os.fsencode(path), _to_int64(offset_bytes), _to_int64(size)
        )


def cuda_device_count() -> int:
    """Return how many CUDA devices this process may use; 0 without a driver or a device.

    The call starts the driver where there is one: a process must not fork after it.
    """
    with _gearfall_errors():
        return _cuda_ext.cuda_device_count()


@contextmanager
def _gearfall_errors() -> Iterator[None]:
    try:
        yield
    except (_cuda_ext.OutOfRange, _cuda_ext.Truncated) as error:
        raise CorruptCheckpoint(str(error)) from error
    except _cuda_ext.DeviceError as error:
        raise Unavailable(str(error)) from error


def _to_int64(value: int) -> int:
    """Clamp to what the extension takes; whatever is clamped lies outside every file anyway."""
    return max(-1, min(value, 2**63 - 1))


def _view_bytes(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(bytearray())
