"""What the tiers beyond a node's own disk give: `python -m bench.tiers`.

One checkpoint comes from a file share, a web server, an S3 server and a neighbour's store (over its
bulk socket, and over a gRPC stream beside it), all on this machine. `transport`: into memory that
is there, every chunk checked. `load`: to SSD and memory in one pass, as a store brings it; `memory`
stands for a load whose bytes cost nothing to get. The ceiling is the neighbour's bulk socket read
raw: four connections, one request each, nothing checked. Rounds are interleaved and rotate.
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.load.model import write_llama
from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import Spread, rotated, spread
from bench.raw_read import make_ready
from bench.tiers.servers import Places, serving
from bench.tiers.ways import (
    BULK,
    MEMORY,
    RAW,
    REMOTE,
    opened,
    raw_read,
    raw_tokens,
    transport,
    whole_load,
)
from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source
from gearfall.core.checkpoint.manifest import Manifest

RESULTS = Path(__file__).parents[1] / "results" / "tiers.json"
TRANSPORT, LOAD = "transport", "load"
MIB = 1 << 20
SWITCH_INTERVAL_S = 0.0005
"""As a store has it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The whole checkpoint once."""

    kind: str
    way: str
    round_index: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one way."""

    kind: str
    way: str
    gb_per_s: Spread
    of_ceiling: Spread
    """Its bandwidth over the raw socket's of the same round."""
    of_bulk: Spread
    """Its bandwidth over the bulk socket's, of the same kind and round."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiers", description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk that loads go to")
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    before = machine_facts()
    with tempfile.TemporaryDirectory(dir=flags.directory or Path.cwd() / "build") as home:
        checkpoint = Path(home) / "bucket" / "model"
        manifest = write_checkpoint(checkpoint, flags.mebibytes * MIB)
        with serving(Path(home), checkpoint) as places:
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            measuring = _measure(Path(home), checkpoint, manifest, places, flags.rounds)
            samples = asyncio.run(measuring)
    rows = summarize(samples)
    document = {
        "machine": {"before": before, "after": machine_facts()},
        "versions": our_versions(),
        "rows": [asdict(row) for row in rows],
        "samples": [asdict(sample) for sample in samples],
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(document, indent=2) + "\n")
    print_rows(rows, Console())


def write_checkpoint(directory: Path, size_bytes: int) -> Manifest:
    """Convert a random Llama of about `size_bytes` into `directory`."""
    source_directory = directory.with_name("source")
    write_llama(source_directory, size_bytes)
    directory.mkdir(parents=True)
    with open_source(str(source_directory)) as source:
        manifest = convert(source, directory, _no_report)
    shutil.rmtree(source_directory)
    return manifest


def _no_report(_done_bytes: int, _total_bytes: int) -> None:
    return


async def _measure(
    home: Path, checkpoint: Path, manifest: Manifest, places: Places, rounds: int
) -> list[Sample]:
    cells = {f"{TRANSPORT} {way}": (TRANSPORT, way) for way in (RAW, *REMOTE)}
    cells |= {f"{LOAD} {way}": (LOAD, way) for way in (*REMOTE, MEMORY)}
    samples = []
    for index in range(rounds):
        for cell in rotated(tuple(cells), index):
            kind, way = cells[cell]
            if way == RAW:
                seconds = await _time_raw(manifest, places)
            elif kind == TRANSPORT:
                seconds = await _time_transport(way, checkpoint, manifest, places)
            else:
                seconds = await _time_load(home, way, checkpoint, manifest, places)
            samples.append(Sample(kind, way, index, manifest.size_bytes, seconds))
    return samples


async def _time_raw(manifest: Manifest, places: Places) -> float:
    port, tokens = await raw_tokens(places)
    [size_bytes] = {entry.size_bytes for entry in manifest.partitions}
    with make_ready(size_bytes) as file, file.memory() as memory:
        started_s = time.perf_counter()
        await asyncio.to_thread(raw_read, port, tokens, memory)
        return time.perf_counter() - started_s


async def _time_transport(way: str, checkpoint: Path, manifest: Manifest, places: Places) -> float:
    [size_bytes] = {entry.size_bytes for entry in manifest.partitions}
    with make_ready(size_bytes) as file, file.memory() as memory:
        async with opened(way, places, checkpoint, manifest) as source:
            started_s = time.perf_counter()
            await transport(source, manifest, [memory])
            return time.perf_counter() - started_s


async def _time_load(
    home: Path, way: str, checkpoint: Path, manifest: Manifest, places: Places
) -> float:
    directory = home / "incoming"
    directory.mkdir()
    try:
        async with opened(way, places, checkpoint, manifest) as source:
            started_s = time.perf_counter()
            fds = await whole_load(source, manifest, directory)
            seconds = time.perf_counter() - started_s
        for fd in fds:
            os.close(fd)
        return seconds
    finally:
        shutil.rmtree(directory)


def summarize(samples: Sequence[Sample]) -> list[Row]:
    """Sum up each way; ratios are taken within a round."""
    seconds = {(each.kind, each.way, each.round_index): each.seconds for each in samples}
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.kind, sample.way), []).append(sample)
    return [
        Row(
            kind,
            way,
            spread(each.size_bytes / each.seconds / 1e9 for each in group),
            spread(seconds[TRANSPORT, RAW, each.round_index] / each.seconds for each in group),
            spread(seconds[kind, BULK, each.round_index] / each.seconds for each in group),
        )
        for (kind, way), group in groups.items()
    ]


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print medians and ranges, one line for each way."""
    table = Table(box=box.SIMPLE)
    for name in ("", "way", "GB/s", "of the raw socket (range)", "of the bulk socket (range)"):
        table.add_column(name)
    for row in sorted(rows, key=lambda each: each.kind, reverse=True):
        ratios = (
            f"{each.median:.2f} ({each.low:.2f} to {each.high:.2f})"
            for each in (row.of_ceiling, row.of_bulk)
        )
        table.add_row(row.kind, row.way, f"{row.gb_per_s.median:.2f}", *ratios)
    console.print(table)
