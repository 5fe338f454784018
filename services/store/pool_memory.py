"""Fills shared memory with a partition's bytes, each chunk checked against the manifest."""

import mmap
import os
from collections.abc import Callable
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl
from pathlib import Path
from typing import Protocol

from gearfall.core.errors import CorruptCheckpoint
from gearfall.core.manifest import PartitionEntry
from gearfall.infra.native import page_cached_bytes

_SLAB_CHUNKS = 16
"""Chunks a read call: progress and cancellation have this grain."""
READER_THREADS = 4


class ReadChunks(Protocol):
    """`gearfall.infra.native.read_chunks`."""

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
    ) -> list[int]:
        """Fill `destination` from the file; return xxh3_64 of each chunk."""
        ...


def load_partition(
    path: Path, partition: PartitionEntry, read: ReadChunks, report: Callable[[int], None]
) -> int:
    """Read a partition into a new memfd, verify it, seal it; return the descriptor.

    Blocks. `report` is told the bytes of each verified slab and may raise to give up. Raises
    CorruptCheckpoint that names the first bad chunk.
    """
    fd = os.memfd_create(f"gearfall-{path.parent.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, partition.size_bytes)
        with mmap.mmap(fd, partition.size_bytes) as mapping, memoryview(mapping) as memory:
            _fill(path, partition, memory, read, report)
        fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _fill(
    path: Path,
    partition: PartitionEntry,
    memory: memoryview,
    read: ReadChunks,
    report: Callable[[int], None],
) -> None:
    expected = partition.chunk_digests()
    # Direct reads win where the page cache holds little, buffered ones where it holds most.
    is_direct = 2 * page_cached_bytes(path) < partition.size_bytes
    slab_bytes = _SLAB_CHUNKS * partition.chunk_bytes
    for offset in range(0, partition.size_bytes, slab_bytes):
        size_bytes = min(slab_bytes, partition.size_bytes - offset)
        with memory[offset : offset + size_bytes] as slab:
            found = read(
                path,
                offset_bytes=offset,
                size_bytes=size_bytes,
                destination=slab,
                chunk_bytes=partition.chunk_bytes,
                threads=READER_THREADS,
                direct=is_direct,
            )
        first = offset // partition.chunk_bytes
        _check_chunks(path, first, found, expected[first : first + len(found)])
        report(size_bytes)


def _check_chunks(path: Path, first: int, found: list[int], expected: list[int]) -> None:
    for index, (got, wanted) in enumerate(zip(found, expected, strict=True), start=first):
        if got != wanted:
            raise CorruptCheckpoint(
                f"{path.parent.name}/{path.name}: chunk {index} is not what the manifest says "
                f"(xxh3_64 {got:016x}, not {wanted:016x})"
            )
