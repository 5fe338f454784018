"""Reads every byte of a checkpoint and names all that is not what the manifest says."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from gearfall.checkpoint.reading import Checkpoint, open_regular
from gearfall.core.checkpoint.manifest import PartitionEntry
from gearfall.core.errors import CorruptCheckpoint

Report = Callable[[int, int], None]
"""Told (done_bytes, total_bytes), from the verifying thread."""
_THREADS = 4
_BATCH_CHUNKS = 64
_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Damage:
    """A chunk, or a whole file, that is not what the manifest says."""

    file: str
    problem: str
    chunk: int | None = None
    offset_bytes: int = 0
    size_bytes: int = 0

    def __str__(self) -> str:
        place = "" if self.chunk is None else f" chunk {self.chunk} (at {self.offset_bytes})"
        return f"{self.file}{place}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What was read and found."""

    digest: str
    size_bytes: int
    chunks: int
    files: int
    damages: tuple[Damage, ...]

    def check(self) -> None:
        """Raise CorruptCheckpoint that names the first damages, if there are any."""
        if self.damages:
            shown = "; ".join(map(str, self.damages[:4]))
            more = f" and {len(self.damages) - 4} more" if len(self.damages) > 4 else ""
            raise CorruptCheckpoint(f"{shown}{more}")


def verify(checkpoint: Checkpoint, report: Report) -> Verification:
    """Read everything, in memory of a few MiB, and return every damage; raises for none."""
    manifest = checkpoint.manifest
    total_bytes = manifest.size_bytes
    damages: list[Damage] = []
    done_bytes = 0
    with ThreadPoolExecutor(_THREADS) as threads:
        for partition in manifest.partitions:
            for end_bytes, found in _verify_partition(checkpoint, partition, threads):
                damages += found
                report(done_bytes + end_bytes, total_bytes)
            done_bytes += partition.size_bytes
            report(done_bytes, total_bytes)
    damages += _verify_files(checkpoint)
    return Verification(
        digest=checkpoint.digest,
        size_bytes=total_bytes,
        chunks=sum(len(partition.checksums) for partition in manifest.partitions),
        files=len(manifest.files),
        damages=tuple(damages),
    )


def _verify_partition(
    checkpoint: Checkpoint, partition: PartitionEntry, threads: ThreadPoolExecutor
) -> Iterator[tuple[int, Sequence[Damage]]]:
    """Yield (end, damages) of batches of chunks in their order."""
    try:
        fd = open_regular(checkpoint.directory, partition.file)
    except CorruptCheckpoint as error:
        yield 0, [Damage(partition.file, error.message)]
        return
    try:
        found_bytes = os.fstat(fd).st_size
        if found_bytes != partition.size_bytes:
            problem = f"has {found_bytes} bytes, not {partition.size_bytes}"
            yield 0, [Damage(partition.file, problem)]
        whole = min(found_bytes, partition.size_bytes) // partition.chunk_bytes
        chunks = len(partition.checksums) if found_bytes >= partition.size_bytes else whole
        for first in range(0, chunks, _BATCH_CHUNKS):
            batch = range(first, min(first + _BATCH_CHUNKS, chunks))
            damages = threads.map(lambda index: _verify_chunk(fd, partition, index), batch)
            end_bytes = min(partition.size_bytes, (batch[-1] + 1) * partition.chunk_bytes)
            yield end_bytes, [damage for damage in damages if damage]
    finally:
        os.close(fd)


def _verify_chunk(fd: int, partition: PartitionEntry, index: int) -> Damage | None:
    offset_bytes = index * partition.chunk_bytes
    size_bytes = min(partition.chunk_bytes, partition.size_bytes - offset_bytes)
    wanted = partition.checksums[index]
    try:
        found = _digest(fd, offset_bytes, size_bytes)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    else:
        if found == wanted:
            return None
        problem = f"xxh3_64 is {found}, not {wanted}"
    return Damage(partition.file, problem, index, offset_bytes, size_bytes)


def _digest(fd: int, offset_bytes: int, size_bytes: int) -> str:
    digest = xxhash.xxh3_64()
    for done in range(0, size_bytes, _PIECE_BYTES):
        digest.update(os.pread(fd, min(_PIECE_BYTES, size_bytes - done), offset_bytes + done))
    return digest.hexdigest()


def _verify_files(checkpoint: Checkpoint) -> Iterator[Damage]:
    for entry in checkpoint.manifest.files:
        try:
            checkpoint.read_file(entry)
        except CorruptCheckpoint as error:
            yield Damage(entry.name, error.message)
