"""How close loads to a GPU come to its two limits: `python -m bench.device_read`, `make bench-gpu`.

The limits are the disk (raw io_uring into memory that is there, nothing checked) and the bus (a
copy from memory in the pool). Beside them stands a load: disk to pool to device, every chunk
verified, reading and copying at the same time. Rounds are interleaved and their order rotates.
"""

import argparse
import json
import mmap
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measuring.entry import run_bench
from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import Spread, rotated, spread
from bench.raw_read import GIB, prepare, raw_read, write_partition
from gearfall.core.checkpoint.manifest import PartitionEntry
from gearfall.infra.memory.device import DeviceBuffer
from gearfall.infra.memory.native import PoolFile, cuda_device_count, read_chunks

RESULTS = Path(__file__).parent / "results" / "device_read.json"
_DISK, _BUS, _LOAD = "disk to pool, raw", "pool to device", "disk to device, verified"


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one way."""

    target: str
    seconds: Spread
    of_limit: Spread
    """The slower limit of the same round over its time."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON; exit with a word where there is no device."""
    parser = argparse.ArgumentParser(prog="python -m bench.device_read", description=__doc__)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    if not cuda_device_count():
        raise SystemExit("not run: there is no CUDA device here")
    buffer = DeviceBuffer(flags.device, int(flags.gib * GIB))
    with tempfile.TemporaryDirectory(dir=flags.directory or Path.cwd() / "build") as directory:
        rounds = measure(Path(directory) / "partition-0.bin", buffer, flags.rounds)
    rows = summarize(rounds)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "rows": [asdict(row) for row in rows],
        "rounds": rounds,
    }
    flags.out.write_text(json.dumps(document, indent=2) + "\n")
    print_rows(rows, Console())


def measure(path: Path, buffer: DeviceBuffer, rounds: int) -> list[dict[str, float]]:
    """Return the seconds of each way in each round."""
    partition = write_partition(path, buffer.size_bytes)
    found = []
    for index in range(rounds):
        seconds = {}
        for target in rotated((_DISK, _BUS, _LOAD), index):
            prepare(path, is_warm=False)
            if target == _DISK:
                seconds[target] = raw_read(path, partition, is_ring=True)
            elif target == _BUS:
                seconds[target] = _copy(buffer)
            else:
                seconds[target] = _load(path, partition, buffer)
        found.append(seconds)
    return found


def _copy(buffer: DeviceBuffer) -> float:
    with PoolFile(buffer.size_bytes) as file, mmap.mmap(file.fileno(), buffer.size_bytes) as host:
        for offset in range(0, buffer.size_bytes, mmap.PAGESIZE):
            host[offset] = 1
        started_s = time.perf_counter()
        pinned_bytes = buffer.copy_from(host)
        seconds = time.perf_counter() - started_s
    if pinned_bytes != buffer.size_bytes:
        raise SystemExit(f"the driver pinned {pinned_bytes} of {buffer.size_bytes} bytes")
    return seconds


def _load(path: Path, partition: PartitionEntry, buffer: DeviceBuffer) -> float:
    size_bytes = partition.size_bytes
    started_s = time.perf_counter()
    with (
        PoolFile(size_bytes) as file,
        mmap.mmap(file.fileno(), size_bytes) as mapping,
        memoryview(mapping) as memory,
    ):
        read_chunks(
            path,
            offset_bytes=0,
            size_bytes=size_bytes,
            destination=memory,
            direct=True,
            populate_threads=1,
            expected=partition.chunk_digests(),
            device_buffer=buffer.native,
        )
        seconds = time.perf_counter() - started_s
        last = size_bytes - mmap.PAGESIZE
        if buffer.read(last, mmap.PAGESIZE) != memory[last:]:
            raise SystemExit("the device holds other bytes than the file")
    return seconds


def summarize(rounds: Sequence[dict[str, float]]) -> list[Row]:
    """Sum up each way; the limit of a round is the slower of disk and bus."""
    return [
        Row(
            target,
            spread(seconds[target] for seconds in rounds),
            spread(max(seconds[_DISK], seconds[_BUS]) / seconds[target] for seconds in rounds),
        )
        for target in (_DISK, _BUS, _LOAD)
    ]


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print medians and ranges."""
    table = Table("way", "s", "of the limit (range)", box=box.SIMPLE)
    for row in rows:
        ratio = row.of_limit
        table.add_row(
            row.target,
            f"{row.seconds.median:.3f}",
            f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        )
    console.print(table)


if __name__ == "__main__":
    run_bench(main)
