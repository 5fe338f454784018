"""The native extension's typed face: chunked reads, the page cache, pool memory, devices.

Errors arrive in gearfall's words: a range that its file does not hold and a chunk that is not what
was expected are a `CorruptCheckpoint` (its cause tells which), a driver that refuses is
`Unavailable`, a failed system call is an `OSError` with its errno, and an argument that
no file could satisfy is a `ValueError`.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
StopSign = _cuda_ext.StopSign
"""`show` ends, from any thread and for good, what it was given to."""


def read_chunks(
    path: str | os.PathLike[str],
    *,
    offset_bytes: int,
    size_bytes: int,
    destination: Buffer,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    threads: int = 4,
    direct: bool = False,
    ring: bool = True,
    populate_threads: int = 0,
    expected: Sequence[int] = (),
    on_progress: Callable[[int], None] | None = None,
    progress_chunks: int = 1,
    digest: Digest = xxhash.xxh3_64_intdigest,
    device_buffer: _cuda_ext.DeviceBuffer | None = None,
) -> list[int]:
    """Read a range of a file into the front of `destination`; return one digest for each chunk.

    Chunks are read and digested in file order, many at a time, by 1 to 64 `threads`; none of them
    holds the interpreter lock. Where `direct` is asked for, it is used if the file system has it
    and `offset_bytes`, `chunk_bytes` and the destination's address are multiples of 4096: through
    io_uring if `ring` and the kernel permit it, else by the threads themselves. A tail always goes
    through the page cache. `populate_threads` (up to 64) fault fresh memory in ahead of the reads.

    A chunk whose digest is not the `expected` one ends the read at once. `on_progress` is told, in
    the calling thread, how many chunks from the front on are verified: after every so many
    `progress_chunks` and at the end; what it raises cancels the read. Each verified chunk is copied
    to `device_buffer` (`infra.memory.device`), if there is one, while others are read; the copies
    have arrived when this returns. All bounds are checked before the first read. After an error the
    destination's content is undefined.
    """
    with gearfall_errors():
        reading = _cuda_ext.ChunkRead(
            os.fsencode(path),
            _to_int64(offset_bytes),
            _to_int64(size_bytes),
            view_bytes(destination),
            _to_int64(chunk_bytes),
            threads,
            direct,
            ring,
            populate_threads,
            expected,
            digest,
            device_buffer,
        )
        try:
            if on_progress is not None:
                _follow(reading, on_progress, progress_chunks)
            return reading.finish()
        finally:
            reading.close()


def _follow(
    reading: _cuda_ext.ChunkRead, on_progress: Callable[[int], None], step_chunks: int
) -> None:
    seen = 0
    while (verified := reading.wait_beyond(seen + step_chunks - 1)) > seen:
        seen = verified
        on_progress(verified)


def read_method(path: str | os.PathLike[str], *, direct: bool = True, ring: bool = True) -> str:
    """Return how an aligned read of this file is done: io_uring, direct or buffered."""
    chunk_bytes, name = DEFAULT_CHUNK_BYTES, os.fsencode(path)
    with gearfall_errors(), mmap.mmap(-1, mmap.PAGESIZE) as page:
        reading = _cuda_ext.ChunkRead(
            name, 0, 0, memoryview(page), chunk_bytes, 1, direct, ring, 0, (), len, None
        )
        try:
            return reading.method
        finally:
            reading.close()


class PoolFile:
    """A new file of shared memory: filled through `memory`, then sealed and read by others.

    Lies on huge pages and is never swapped where the machine lets us have that. Its one mapping
    lasts until it is sealed, so that page tables are filled once. A context manager; what was not
    sealed is freed at its end.
    """

    def __init__(self, size_bytes: int) -> None:
        """Zeros, none of them allocated. Raises OSError, ValueError for a size that no file has."""
        self._file: _cuda_ext.PoolFile | None = _cuda_ext.PoolFile(_to_int64(size_bytes))
        self._mapping: mmap.mmap | None = None
        self._size_bytes = size_bytes
        self._faulted_bytes = 0
        self._is_uncut = False

    @property
    def kind(self) -> str:
        """`tmpfs` (private, on huge pages) or `memfd`."""
        return self._open().kind

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        return self._size_bytes

    @property
    def faulted_bytes(self) -> int:
        """How much of its front `fault_in` has allocated."""
        return self._faulted_bytes

    def fileno(self) -> int:
        """Return the descriptor to write by; it stays this object's."""
        return self._open().fileno()

    def open_reader(self) -> int:
        """Return a descriptor that what is written can be read by meanwhile, the caller's.

        It can't be turned into one to write by, but by root; sealing fails while there is such one.
        """
        self.cut()
        os.fchmod(self.fileno(), 0o400)
        return os.open(f"/proc/self/fd/{self.fileno()}", os.O_RDONLY | os.O_CLOEXEC)

    def memory(self) -> memoryview:
        """View all of it, writable. To be released before `resize`, `seal` and `close`."""
        return memoryview(self._mapped())[: self._size_bytes]

    def fault_in(self, step_bytes: int, stop: StopSign | None = None) -> None:
        """Allocate up to so many more bytes, from the front on, fewer once the sign is shown.

        Blocks without the interpreter lock. Raises OSError (ENOSPC, ENOMEM) where there is no
        memory to be had.
        """
        begin = self._faulted_bytes
        end = min(begin + step_bytes, self._size_bytes)
        with self.memory() as memory, memory[begin:end] as part:
            self._faulted_bytes += _cuda_ext.fault_in(part, stop or StopSign())

    def resize(self, size_bytes: int) -> None:
        """Cut it, which frees the tail, or lengthen it by zeros. What stays mapped stays so.

        Raises OSError, and ValueError for a size that no file has.
        """
        if size_bytes < 1:
            raise ValueError("a pool file of less than one byte")
        self._mapped().resize(size_bytes)
        self._is_uncut = False
        self._size_bytes = size_bytes
        self._faulted_bytes = min(self._faulted_bytes, size_bytes)

    def shorten(self, size_bytes: int) -> None:
        """Have it end earlier; what lies behind stays allocated until `cut`."""
        assert 1 <= size_bytes <= self._size_bytes
        self._is_uncut = self._is_uncut or size_bytes < self._size_bytes
        self._size_bytes = size_bytes
        self._faulted_bytes = min(self._faulted_bytes, size_bytes)

    def cut(self) -> None:
        """Free what lies behind its end: 3 ms for each GiB. Idempotent, while others use `memory`.

        Whoever is given a descriptor finds it cut.
        """
        if self._is_uncut:
            os.ftruncate(self.fileno(), self._size_bytes)
            self._is_uncut = False

    def seal(self) -> int:
        """Make the content unchangeable; return a descriptor to read it by, the caller's from here.

        Raises OSError while a writable mapping is left, BufferError while it is this object's.
        """
        file = self._open()
        self._unmap()
        self.cut()
        return file.seal()

    def close(self) -> None:
        """Let go of it. Idempotent."""
        self._unmap()
        self._file = None

    def __enter__(self) -> "PoolFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> _cuda_ext.PoolFile:
        if self._file is None:
            raise ValueError("the pool file is closed")
        return self._file

    def _mapped(self) -> mmap.mmap:
        if self._mapping is None:
            self._mapping = mmap.mmap(self.fileno(), self._size_bytes)
            # All of it at once: `resize` takes no mapping whose parts differ. Advice, for memfds.
            with suppress(OSError):
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        return self._mapping

    def _unmap(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None


def page_cached_bytes(
    path: str | os.PathLike[str], *, offset_bytes: int = 0, size_bytes: int | None = None
) -> int:
    """Return how many bytes of a range (by default to the end) the page cache holds.

    Direct reads are faster where little is cached, buffered ones where much is. The kernel answers
    truly only for files that the caller owns or may write; others look fully cached.
    """
    size = Path(path).stat().st_size - offset_bytes if size_bytes is None else size_bytes
    with gearfall_errors():
        return _cuda_ext.page_cached_bytes(
            os.fsencode(path), _to_int64(offset_bytes), _to_int64(size)
        )


def cuda_device_count() -> int:
    """Return how many CUDA devices this process may use; 0 without a driver or a device.

    The call starts the driver where there is one: a process must not fork after it.
    """
    with gearfall_errors():
        return _cuda_ext.cuda_device_count()


@contextmanager
def gearfall_errors() -> Iterator[None]:
    """Turn the extension's errors into gearfall's."""
    try:
        yield
    except (_cuda_ext.OutOfRange, _cuda_ext.Truncated, _cuda_ext.CorruptChunk) as error:
        raise CorruptCheckpoint(str(error)) from error
    except _cuda_ext.DeviceError as error:
        raise Unavailable(str(error)) from error


def _to_int64(value: int) -> int:
    """Clamp to what the extension takes; whatever is clamped lies outside every file anyway."""
    return max(-1, min(value, 2**63 - 1))


def view_bytes(buffer: Buffer) -> memoryview:
    """View any contiguous buffer as bytes, as the extension takes them."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(bytearray())
