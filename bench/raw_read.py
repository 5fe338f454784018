"""How close the store's way into memory comes to the disk: `python -m bench.raw_read`.

The ceiling is the faster of two raw direct reads into memory on huge pages that is faulted in
beforehand, nothing checked: io_uring, and 16 threads of preadv. Beside it, cold (file not in the
page cache) and warm (wholly in it), stands what a load does: read, verify every chunk, seal, into
memory that the store has kept ready, or into fresh memory, which it allocates and faults in first.
Rounds are interleaved and their order rotates.
"""

import argparse
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import xxhash
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measuring.entry import run_bench
from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import Spread, rotated, spread
from gearfall.core.checkpoint.manifest import PartitionEntry
from gearfall.infra.memory.native import (
    DEFAULT_CHUNK_BYTES,
    PoolFile,
    page_cached_bytes,
    read_chunks,
    read_method,
)
from services.store.tiers.pool_memory import load_partition

RESULTS = Path(__file__).parent / "results" / "raw_read.json"
GIB = 2**30
_RAW_THREADS = 16
_RAW_REQUEST_BYTES = 1 << 20
_ATTEMPTS = 20
_RAW = ("raw io_uring", "raw threads")
_FRESH = "load, fresh memory"
_COLD = ("load", _FRESH, "load, no io_uring", "load, 4 KiB pages")
_WARM = ("load, warm",)


@dataclass(frozen=True, slots=True)
class Sample:
    """One read of the whole file."""

    target: str
    size_bytes: int
    round_index: int
    seconds: float
    phases_s: dict[str, float]
    """Of what came after the read: seal, map (in a new mapping), touch (its page tables), free."""


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one target on one file."""

    target: str
    size_bytes: int
    seconds: Spread
    gb_per_s: Spread
    of_ceiling: Spread
    """Its bandwidth over the same round's ceiling."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.raw_read", description=__doc__)
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    before = machine_facts()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(dir=flags.directory or Path.cwd() / "build") as directory:
        for gib in flags.gib:
            samples += measure(Path(directory) / "partition-0.bin", int(gib * GIB), flags.rounds)
    rows = summarize(samples)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": {"before": before, "after": machine_facts()},
        "versions": our_versions(),
        "rows": [asdict(row) for row in rows],
        "samples": [asdict(sample) for sample in samples],
    }
    flags.out.write_text(json.dumps(document, indent=2) + "\n")
    print_rows(rows, samples, Console())


def measure(path: Path, size_bytes: int, rounds: int) -> list[Sample]:
    """Write a file of random bytes and read it in every way, `rounds` times each."""
    partition = write_partition(path, size_bytes)
    method = read_method(path)
    if method != "io_uring":
        raise SystemExit(f"direct reads are {method} here: there is no ceiling to compare with")
    samples = []
    for index in range(rounds):
        for target in rotated((*_RAW, *_COLD, *_WARM), index):
            prepare(path, is_warm=target in _WARM)
            if target in _RAW:
                seconds, phases_s = raw_read(path, partition, is_ring=target == "raw io_uring"), {}
            else:
                load = _prepare_load(target, path, partition)
                started_s = time.perf_counter()
                fd = load()
                seconds = time.perf_counter() - started_s
                phases_s = attach_and_free(fd, size_bytes)
            samples.append(Sample(target, size_bytes, index, seconds, phases_s))
    path.unlink()
    return samples


def write_partition(path: Path, size_bytes: int) -> PartitionEntry:
    """Write random bytes and return what a manifest says about them."""
    checksums = []
    with path.open("wb") as file:
        for _ in range(0, size_bytes, DEFAULT_CHUNK_BYTES):
            chunk = os.urandom(min(DEFAULT_CHUNK_BYTES, size_bytes - file.tell()))
            checksums.append(xxhash.xxh3_64_hexdigest(chunk))
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return PartitionEntry(path.name, size_bytes, DEFAULT_CHUNK_BYTES, tuple(checksums))


def prepare(path: Path, *, is_warm: bool) -> None:
    """Bring the whole file into the page cache, or none of it."""
    wanted_bytes = path.stat().st_size if is_warm else 0
    with path.open("rb", buffering=0) as file:
        for _ in range(_ATTEMPTS):
            if is_warm:
                buffer = bytearray(DEFAULT_CHUNK_BYTES)
                while file.readinto(buffer):
                    pass
                file.seek(0)
            else:
                # The kernel passes over pages that it holds at the moment.
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found_bytes = page_cached_bytes(path)
            if found_bytes == wanted_bytes:
                return
    raise SystemExit(f"the page cache holds {found_bytes} bytes of {path}, not {wanted_bytes}")


def raw_read(path: Path, partition: PartitionEntry, *, is_ring: bool) -> float:
    """Return the seconds of a direct read into memory that is there, nothing checked."""
    size_bytes = partition.size_bytes
    with make_ready(size_bytes) as file, file.memory() as memory:
        started_s = time.perf_counter()
        if is_ring:
            read_chunks(
                path,
                offset_bytes=0,
                size_bytes=size_bytes,
                destination=memory,
                direct=True,
                digest=_no_digest,
            )
        else:
            _read_by_threads(path, memory)
        return time.perf_counter() - started_s


def _no_digest(_: memoryview) -> int:
    return 0


def _read_by_threads(path: Path, memory: memoryview) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(offset: int) -> int:
        with memory[offset : offset + _RAW_REQUEST_BYTES] as part:
            return os.preadv(fd, [part], offset)

    try:
        with ThreadPoolExecutor(_RAW_THREADS) as threads:
            done_bytes = sum(threads.map(read, range(0, len(memory), _RAW_REQUEST_BYTES)))
    finally:
        os.close(fd)
    if done_bytes != len(memory):
        raise SystemExit(f"a raw read of {done_bytes} bytes of {len(memory)}")


def make_ready(size_bytes: int) -> PoolFile:
    """Return pool memory that is there, as the store keeps it for the next load."""
    file = PoolFile(size_bytes)
    file.fault_in(size_bytes)
    return file


def _prepare_load(target: str, path: Path, partition: PartitionEntry) -> Callable[[], int]:
    if target == "load, 4 KiB pages":
        return partial(_load_into_memfd, path, partition)
    read = partial(read_chunks, ring=target != "load, no io_uring")
    ready = None if target == _FRESH else make_ready(partition.size_bytes)
    return lambda: load_partition(
        path, partition, read, lambda _: None, PoolFile if ready is None else lambda _: ready
    )


def _load_into_memfd(path: Path, partition: PartitionEntry) -> int:
    """As `load_partition` where no tmpfs of our own is permitted."""
    fd = os.memfd_create("bench")
    os.ftruncate(fd, partition.size_bytes)
    with mmap.mmap(fd, partition.size_bytes) as mapping, memoryview(mapping) as memory:
        read_chunks(
            path,
            offset_bytes=0,
            size_bytes=partition.size_bytes,
            destination=memory,
            direct=True,
            populate_threads=2,
            expected=partition.chunk_digests(),
        )
    return fd


def attach_and_free(fd: int, size_bytes: int) -> dict[str, float]:
    """Map loaded memory as an engine does, fault its page tables in, free all of it; time each."""
    phases_s: dict[str, float] = {}

    def timed(name: str, step: Callable[[], object]) -> None:
        started_s = time.perf_counter()
        step()
        phases_s[name] = time.perf_counter() - started_s

    mappings: list[mmap.mmap] = []
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    timed("map", lambda: mappings.append(mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE, protection)))
    timed("touch", lambda: mappings[0][:: mmap.PAGESIZE])
    mappings[0].close()
    timed("free", lambda: os.close(fd))
    return phases_s


def summarize(samples: Sequence[Sample]) -> list[Row]:
    """Sum up each (file, target); the ceiling of a round is the faster raw read."""
    ceilings_s: dict[tuple[int, int], float] = {}
    for sample in samples:
        if sample.target in _RAW:
            key = (sample.size_bytes, sample.round_index)
            ceilings_s[key] = min(sample.seconds, ceilings_s.get(key, sample.seconds))
    groups: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.size_bytes, sample.target), []).append(sample)
    return [
        Row(
            target,
            size_bytes,
            spread(sample.seconds for sample in group),
            spread(size_bytes / sample.seconds / 1e9 for sample in group),
            spread(ceilings_s[size_bytes, each.round_index] / each.seconds for each in group),
        )
        for (size_bytes, target), group in groups.items()
    ]


def print_rows(rows: Sequence[Row], samples: Sequence[Sample], console: Console) -> None:
    """Print medians and ranges, one line for each target and file."""
    table = Table(box=box.SIMPLE)
    for name in ("GiB", "target", "s", "GB/s", "of ceiling (range)", "map + touch ms", "free ms"):
        table.add_column(name)
    for row in rows:
        key = (row.target, row.size_bytes)
        phases = [each.phases_s for each in samples if (each.target, each.size_bytes) == key]
        attached = freed = ""
        if phases[0]:
            attached = (
                f"{spread(1e3 * (each['map'] + each['touch']) for each in phases).median:.2f}"
            )
            freed = f"{spread(1e3 * each['free'] for each in phases).median:.1f}"
        ratio = row.of_ceiling
        table.add_row(
            f"{row.size_bytes / GIB:g}",
            row.target,
            f"{row.seconds.median:.3f}",
            f"{row.gb_per_s.median:.2f}",
            f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
            attached,
            freed,
        )
    console.print(table)


if __name__ == "__main__":
    run_bench(main)
