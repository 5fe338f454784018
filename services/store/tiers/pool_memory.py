"""Fills shared memory with a partition's bytes, each chunk checked against the manifest."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from gearfall.core.checkpoint.manifest import PartitionEntry
from gearfall.infra.memory.native import PoolFile, page_cached_bytes

READER_THREADS = 4
_POPULATE_THREADS = {"tmpfs": 1, "memfd": 2}
"""Huge pages are faulted in faster than any disk reads; pages of 4 KiB keep two threads busy."""
_PROGRESS_CHUNKS = 4
"""What is told of each goes through the event loop to everybody who follows the load."""


class ReadChunks(Protocol):
    """`gearfall.infra.memory.native.read_chunks`."""

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
        """Fill `destination` from the file; return xxh3_64 of each chunk, all as expected."""
        ...


Allocate = Callable[[int], PoolFile]
"""Makes pool memory of so many bytes, some of which may be faulted in already."""


def load_partition(
    path: Path,
    partition: PartitionEntry,
    read: ReadChunks,
    report: Callable[[int], None],
    allocate: Allocate = PoolFile,
) -> int:
    """Read a partition into new shared memory, verify it, seal it; return the descriptor.

    Blocks. `report` is told the bytes verified since its last call and may raise to give up.
    Raises CorruptCheckpoint that names the first bad chunk found.
    """
    with allocate(partition.size_bytes) as file:
        fill_partition(path, partition, file, read, report)
        return file.seal()


def fill_partition(
    path: Path,
    partition: PartitionEntry,
    file: PoolFile,
    read: ReadChunks,
    report: Callable[[int], None],
) -> None:
    """Read a partition into `file`, verified from the front on; `report` as in `load_partition`."""
    done_bytes = 0

    def on_progress(verified_chunks: int) -> None:
        nonlocal done_bytes
        verified_bytes = min(verified_chunks * partition.chunk_bytes, partition.size_bytes)
        report(verified_bytes - done_bytes)
        done_bytes = verified_bytes

    is_there = file.faulted_bytes == partition.size_bytes
    with file.memory() as memory:
        read(
            path,
            offset_bytes=0,
            size_bytes=partition.size_bytes,
            destination=memory,
            chunk_bytes=partition.chunk_bytes,
            threads=READER_THREADS,
            # Direct reads win where the page cache holds little, buffered ones where it holds most.
            direct=2 * page_cached_bytes(path) < partition.size_bytes,
            populate_threads=0 if is_there else _POPULATE_THREADS[file.kind],
            expected=partition.chunk_digests(),
            on_progress=on_progress,
            progress_chunks=_PROGRESS_CHUNKS,
        )
