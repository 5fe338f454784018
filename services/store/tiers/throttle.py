"""A slower disk than there is: reads paced to a rate, to compare schedulers on one machine."""

import os
import time
from collections.abc import Callable, Sequence

from services.store.tiers.pool_memory import ReadChunks

_SLICES_PER_S = 20
"""A slice of a read takes this part of a second at the rate, if it is not one chunk already."""


class PacedRead:
    """A ReadChunks that reads no more than so many bytes a second, over all of a store's loads.

    Slice by slice of whole chunks; after each it waits until as long has passed as the bytes would
    have taken.
    """

    def __init__(
        self,
        read: ReadChunks,
        bytes_per_s: int,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`read` does the reading. Blocks in `sleep`, in the thread that reads."""
        self._read = read
        self._bytes_per_s = bytes_per_s
        self._monotonic = monotonic
        self._sleep = sleep
        self._free_at_s = 0.0

    def __call__(
        self,
        path: str | os.PathLike[str],
        *,
        offset_bytes: int,
        size_bytes: int,
        destination: memoryview,
        chunk_bytes: int,
        threads: int,
        direct: bool,
        populate_threads: int,
        expected: Sequence[int],
        on_progress: Callable[[int], None],
        progress_chunks: int,
    ) -> list[int]:
        """Fill `destination` from the file; as `gearfall.infra.memory.native.read_chunks`."""
        chunks = max(1, self._bytes_per_s // _SLICES_PER_S // chunk_bytes)
        digests: list[int] = []
        for first in range(0, len(expected), chunks):
            begin = first * chunk_bytes
            end = min(size_bytes, begin + chunks * chunk_bytes)
            self._wait_for(end - begin)
            digests += self._read(
                path,
                offset_bytes=offset_bytes + begin,
                size_bytes=end - begin,
                destination=destination[begin:end],
                chunk_bytes=chunk_bytes,
                threads=threads,
                direct=direct,
                populate_threads=populate_threads,
                expected=expected[first : first + chunks],
                on_progress=lambda _: None,
                progress_chunks=progress_chunks,
            )
            on_progress(len(digests))
        return digests

    def _wait_for(self, size_bytes: int) -> None:
        """Return when the disk would have delivered so many bytes more."""
        self._free_at_s = max(self._free_at_s, self._monotonic()) + size_bytes / self._bytes_per_s
        self._sleep(max(0.0, self._free_at_s - self._monotonic()))
