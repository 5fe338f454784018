"""How fast a model comes to memory, beside other loaders: `python -m bench.load`.

Every loader runs in a fresh process that has imported what it needs; its time ends when every page
of every tensor was touched. gearfall's time is a load by the store (every chunk's checksum
compared; no other loader checks any), a lease and a mapping in another process, and the touch
there. Before a load the store has had the time to make memory ready, as a store that is not loading
has; "fresh memory" is a load right after another one, that finds none. cold: none of the model's
files in the page cache, looked up before each run. warm: all of the loader's file in it. resident:
the model lies in the store's pool and is attached.

Rounds are interleaved and their order rotates. In the first round each loader's tensors are hashed
and compared. Peers live in an environment of their own, made when absent; one that does not install
is named.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.load.model import write_llama
from bench.load.peer import LOADERS
from bench.load.peers import prepare_peers, versions
from bench.load.report import FRESH, OURS, RAW, Sample, of_ceiling, phase_lines, summarize, table
from bench.load.targets import verdicts
from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import rotated
from gearfall.infra.memory.native import page_cached_bytes

RESULTS = Path(__file__).parents[1] / "results" / "load.json"
PEER_SCRIPT = Path(__file__).with_name("peer.py")
FILES = {"torch.load": "model.pt", "torch.load mmap": "model.pt", "tensorizer": "model.tensors"}
"""What a loader reads, where that is not model.safetensors."""


MAX_STRAY_SHARE = 0.01
"""Of a file: a busy machine takes a page back now and then."""


class Child:
    """A process that speaks lines of JSON."""

    def __init__(self, *argv: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `end`)
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.first = self._read()

    def ask(self, **request: object) -> dict[str, Any]:
        """Send a line and return the one that comes back."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"a loader died: {self._log.read()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """Close its input and wait."""
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()
        self._process.wait()


@contextmanager
def child(*argv: str) -> Iterator[Child]:
    """Run a child for the length of a block."""
    started = Child(*argv)
    try:
        yield started
    finally:
        started.end()


class Bench:
    """One model in every form, and the store that holds it."""

    def __init__(self, peers_python: Path, store: Child, model: str, directory: Path) -> None:
        self._peers_python = str(peers_python)
        self._store = store
        self._model = model
        self._directory = directory
        found = store.ask(do="register", model=model, path=str(directory))
        self._partitions = [Path(path) for path in found["paths"]]
        self.size_bytes = found["size_bytes"]
        self.missing: dict[str, str] = {}
        self._digests: dict[str, str] = {}

    def run(self, loader: str, condition: str, index: int) -> Sample | None:
        """Measure once; None where the loader is not installed."""
        if loader in RAW:
            return self._run_raw(loader, condition, index)
        if loader in {OURS, FRESH}:
            return self._run_ours(loader, condition, index)
        return self._run_peer(loader, condition, index)

    def _run_raw(self, loader: str, condition: str, index: int) -> Sample:
        kind = loader.removeprefix("raw ")
        argv = (sys.executable, "-m", "bench.load.ours", "raw", str(self._partitions[0]), kind)
        with child(*argv) as process:
            self._prepare(self._partitions, condition)
            done = process.ask()
        return Sample(loader, condition, self.size_bytes, index, done["load_s"])

    def _run_ours(self, loader: str, condition: str, index: int) -> Sample:
        argv = (
            sys.executable,
            "-m",
            "bench.load.ours",
            "attach",
            self._store.first["attach_socket"],
        )
        with child(*argv, self._model) as client:
            load_s = 0.0
            if condition != "resident":
                self._store.ask(do="unload", model=self._model)
                self._prepare(self._partitions, condition)
                self._store.ask(do="drop spare" if loader == FRESH else "fill spare")
                load_s = self._store.ask(do="load", model=self._model)["load_s"]
            manifest = self._store.ask(do="load", model=self._model)["digest"]
            done = client.ask(digest=self._wants_digest(condition, index), manifest=manifest)
        self._compare(loader, done["digest"])
        phases_s = {name: done[f"{name}_s"] for name in ("lease", "map", "views", "touch")}
        if condition != "resident":
            phases_s = {"load": load_s, **phases_s}
        peak_bytes = max(self._load_peak_bytes, done["peak_bytes"])
        total_s = sum(phases_s.values())
        return Sample(
            loader,
            condition,
            self.size_bytes,
            index,
            total_s,
            phases_s,
            peak_bytes,
            done["faults"],
        )

    def _run_peer(self, loader: str, condition: str, index: int) -> Sample | None:
        argv = (self._peers_python, "-P", str(PEER_SCRIPT), loader, str(self._directory))
        with child(*argv) as process:
            if "missing" in process.first:
                self.missing[loader] = process.first["missing"]
                return None
            self._prepare([self._directory / FILES.get(loader, "model.safetensors")], condition)
            done = process.ask(digest=self._wants_digest(condition, index))
        self._compare(loader, done["digest"])
        phases_s = {"load": done["load_s"], "touch": done["touch_s"]}
        peak_bytes = done["peak_bytes"] - done["tensor_bytes"]
        total_s = sum(phases_s.values())
        return Sample(loader, condition, self.size_bytes, index, total_s, phases_s, peak_bytes)

    def _prepare(self, paths: Sequence[Path], condition: str) -> None:
        """Have of all the model's files only these in the page cache: it does not hold them all."""
        prepare([*self._partitions, *self._directory.glob("model.*")], "cold")
        prepare(paths, condition)

    def _wants_digest(self, condition: str, index: int) -> bool:
        return index == 0 and condition != "warm"

    def _compare(self, loader: str, digest: str) -> None:
        if digest:
            self._digests[loader] = digest
            if len(set(self._digests.values())) > 1:
                raise SystemExit(f"the loaders' tensors differ: {self._digests}")

    def load(self) -> None:
        """Bring the model to the pool, watching the store's memory, which takes time."""
        self._load_peak_bytes = self._store.ask(do="measure", model=self._model)["peak_bytes"]

    def unload(self) -> None:
        """Have it out of the pool."""
        self._store.ask(do="unload", model=self._model)


def prepare(paths: Sequence[Path], condition: str) -> None:
    """Bring files wholly into the page cache, or wholly out of it; look whether it is so."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            if condition == "warm":
                buffer = bytearray(4 << 20)
                while file.readinto(buffer):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        share = page_cached_bytes(path) / path.stat().st_size
        if condition != "resident" and abs(share - (condition == "warm")) > MAX_STRAY_SHARE:
            raise SystemExit(f"{condition}: the page cache holds {share:.1%} of {path}")


def measure(flags: argparse.Namespace, peers_python: Path, console: Console) -> list[Sample]:
    """Run every loader on every size under every condition."""
    samples: list[Sample] = []
    for size_gb in flags.sizes:
        directory = (flags.directory / f"llama-{size_gb:g}gb").absolute()
        with console.status(f"writing {directory.name}"):
            write_model(directory, int(size_gb * 1e9), peers_python)
        argv = (sys.executable, "-m", "bench.load.ours", "store", str(flags.directory / "store"))
        with child(*argv) as store:
            with console.status(f"registering {directory.name}"):
                bench = Bench(peers_python, store, directory.name, directory)
                os.sync()
                bench.load()
            samples += _run_rounds(bench, flags, console)
            bench.unload()
        for loader, reason in bench.missing.items():
            console.print(f"[yellow]{loader} could not run:[/] {reason}")
    return samples


def write_model(directory: Path, size_bytes: int, peers_python: Path) -> None:
    """Write what is absent of a model: safetensors, and the formats that loaders have alone."""
    if not directory.exists():
        write_llama(directory, size_bytes)
    argv = (str(peers_python), "-P", str(PEER_SCRIPT), "write", str(directory))
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run_rounds(bench: Bench, flags: argparse.Namespace, console: Console) -> list[Sample]:
    rounds, peers = flags.rounds, flags.peers
    plan = {"cold": (*RAW, OURS, FRESH, *peers), "warm": (OURS, *peers), "resident": (OURS,)}
    cells = [f"{condition}/{name}" for condition, names in plan.items() for name in names]
    samples: list[Sample] = []
    with Progress(console=console) as bars:
        task = bars.add_task("measuring", total=rounds * len(cells))
        for index in range(rounds):
            for cell in rotated(cells, index * 3):
                condition, _, loader = cell.partition("/")
                sample = bench.run(loader, condition, index)
                samples += [sample] if sample else []
                bars.advance(task)
    return samples


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0, 4.0], help="of models, GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=LOADERS, default=[*LOADERS])
    parser.add_argument("--directory", type=Path, default=Path("build/load"))
    parser.add_argument("--peers-venv", type=Path, default=Path("build/peers-load").absolute())
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    console = Console(stderr=True)
    flags.directory.mkdir(parents=True, exist_ok=True)
    with console.status("preparing peers"):
        python, missing = prepare_peers(flags.peers_venv)
    before = machine_facts()
    samples = measure(flags, python, console)
    rows = summarize(samples)
    ceilings = {size: of_ceiling(samples, size) for size in {row.size_bytes for row in rows}}
    document = {
        "machine": {"before": before, "after": machine_facts()},
        "versions": {"gearfall": our_versions(), "peers": versions(python)},
        "not_installed": missing,
        "of_ceiling": {size: asdict(found) for size, found in ceilings.items() if found},
        "targets": [{**asdict(found), "is_met": found.is_met} for found in verdicts(samples)],
        "rows": [asdict(row) for row in rows],
        "samples": [asdict(sample) for sample in samples],
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(document, indent=2) + "\n")
    out = Console(width=max(Console().width, 140))
    out.print(table(rows))
    out.print(*phase_lines(rows), sep="\n")
    for size, found in sorted(ceilings.items()):
        if found:
            out.print(
                f"{size / 1e9:.2f} GB: the cold load runs at {found.median:.3f} "
                f"({found.low:.3f} to {found.high:.3f}) of the raw direct read"
            )
    out.print("\nTargets, one figure a round:")
    out.print(*(found.line() for found in verdicts(samples)), sep="\n")
    for name, reason in missing.items():
        out.print(f"[yellow]{name} did not install:[/] {reason}")
    out.print(
        f"load average {before['load_average']} before, {machine_facts()['load_average']} after"
    )
