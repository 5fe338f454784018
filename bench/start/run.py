"""From nothing running to a model's first token: `python -m bench.start`.

gearfall: what a worker does when a model is assigned to it, by the worker's own code: load, lease,
engine from the warm parent, build and canary beside the load, then the first token of a request
that waited all the while.
Compared with a fresh interpreter that runs transformers' `from_pretrained` and `generate` of one
token. dram: the model lies in the store's pool; its peer finds its file in the page cache. ssd:
nothing is in memory, for both.

Rounds are interleaved. etcd, queue and router are not part of it.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.load.model import write_llama
from bench.load.report import Sample
from bench.load.run import prepare
from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import spread
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId, ModelName, NodeId, WorkerId
from gearfall.core.start_timeline import StartTimeline
from gearfall.infra.memory.pool_lease import take_lease
from gearfall.infra.net.grpc_server import start_server
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState
from gearfall.pb.store_pb2_grpc import add_StoreServicer_to_server
from services.store.models.model_registry import record_of
from services.store.service import StoreService
from services.store.servicer import StoreServicer
from services.store.settings import StoreSettings
from services.worker.engine_link.messages import SubmitJob
from services.worker.ports import EngineProcess
from services.worker.processes.zygote_client import Zygote
from services.worker.replicas.replica_start import (
    ReplicaSettings,
    StartPorts,
    fetching,
    leased,
    ready,
    spawned,
)
from services.worker.replicas.start_clock import StartClock
from services.worker.store_client import GrpcStoreClient

RESULTS = Path(__file__).parents[1] / "results" / "start.json"
PEER = Path(__file__).with_name("peer.py")
OURS, THEIRS = "gearfall", "transformers"
REQUEST = SubmitJob(
    JobId("first"),
    Epoch(1),
    prompt_token_ids=(1, 5, 9, 13, 17),
    generated_token_ids=(),
    sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
)
"""Waits for the model while it starts, as the job that had it started does in the queue."""
POOL_BYTES = 64 * 2**30


class Site:
    """A store and a worker's warm parent, and the model they start."""

    def __init__(self, store: StoreService, zygote: Zygote, model: ModelName, threads: int) -> None:
        self.store = store
        self._model = model
        client = GrpcStoreClient(lambda: store.address)
        self._ports = StartPorts(client, take_lease, zygote)
        node = store.settings.node_id
        self._settings = ReplicaSettings(WorkerId("bench"), node, "cpu", 4, threads)

    async def start(self) -> tuple[float, StartTimeline]:
        """Start a replica, take one request's first token, stop; return seconds and timeline."""
        record = record_of(self.store.ssd.get(self._model), (self.store.settings.node_id,))
        begun_s = time.monotonic()
        clock = StartClock(begun_s)
        async with (
            fetching(record, self._ports.store) as fetch,
            leased(record, self._settings, self._ports, clock) as held,
        ):
            files = await fetch
            async with spawned(
                record, self._settings, self._ports, held, files, clock=clock, expected=(REQUEST,)
            ) as engine:
                found = await ready(engine, held)
                timeline = clock.finish(time.monotonic(), found)
                await _first_token(engine)
                return time.monotonic() - begun_s, timeline

    async def prepare(self, tier: str) -> None:
        """Have the model's bytes in `tier` and nowhere above it."""
        stored = self.store.ssd.get(self._model)
        if tier == "dram":
            await self.store.load(self._model).wait()
            return
        if self.store.pool.get(self._model) is not None:
            self.store.unload(self._model)
        prepare([stored.partition_path(i) for i in range(len(stored.manifest.partitions))], "cold")


async def _first_token(engine: EngineProcess) -> None:
    engine.send(REQUEST)
    async for step in engine:
        if any(run.token_ids for run in step.runs):
            return


@asynccontextmanager
async def running_site(directory: Path, source: Path, threads: int) -> AsyncIterator[Site]:
    """Run a store with its gRPC door and a zygote; register the model with its canary."""
    cluster = Cluster(MemoryState())
    await cluster.start()
    settings = StoreSettings(NodeId("bench"), directory, directory / "attach", POOL_BYTES)
    store, zygote = StoreService(settings, cluster), Zygote()
    await store.open()
    server = await start_server(
        "127.0.0.1:0",
        lambda s: add_StoreServicer_to_server(StoreServicer(store), s),
        ("gearfall.v1.Store",),
    )
    try:
        await store.start(server.address)
        await zygote.start()
        model = ModelName(source.name)
        if model not in store.ssd.models:
            await store.register(model, str(source)).wait()
        await store.read_canary(model)
        yield Site(store, zygote, model, threads)
    finally:
        await zygote.stop()
        await server.stop(0.0)
        await store.stop()
        await cluster.stop()


async def measure(flags: argparse.Namespace, console: Console) -> list[Sample]:
    """Run all rounds."""
    source = (flags.directory / f"llama-{flags.size:g}gb").absolute()
    if not source.exists():
        with console.status(f"writing {source.name}"):
            write_llama(source, int(flags.size * 1e9))
    samples: list[Sample] = []
    async with running_site(flags.directory / "store", source, flags.threads) as site:
        size_bytes = site.store.ssd.get(ModelName(source.name)).manifest.size_bytes
        for index in range(flags.rounds):
            for tier in ("dram", "ssd"):
                with console.status(f"round {index + 1}, {tier}"):
                    await site.prepare(tier)
                    seconds, timeline = await site.start()
                    phases = {**dict(timeline.phases()), "request": seconds - timeline.total_s}
                    samples.append(Sample(OURS, tier, size_bytes, index, seconds, phases))
                    condition = "warm" if tier == "dram" else "cold"
                    prepare([source / "model.safetensors"], condition)
                    seconds, phases = await asyncio.to_thread(_run_peer, source)
                    samples.append(Sample(THEIRS, tier, size_bytes, index, seconds, phases))
    return samples


def _run_peer(source: Path) -> tuple[float, dict[str, float]]:
    started_s = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        done = subprocess.run(
            [sys.executable, "-P", str(PEER), str(source)],
            stdout=subprocess.PIPE,
            stderr=log,
            check=True,
        )
    seconds = time.perf_counter() - started_s
    phases: dict[str, float] = json.loads(done.stdout)
    return seconds, {**phases, "interpreter": seconds - sum(phases.values())}


def table(samples: Sequence[Sample]) -> Table:
    """Return medians over the rounds, the phases' too, and the ratio round by round."""
    found = Table(box=box.SIMPLE)
    for name in ("from", "system", "s", "range", "x gearfall", "range", "phases ms"):
        found.add_column(name)
    for tier, system in dict.fromkeys((s.condition, s.loader) for s in samples):
        group = [s for s in samples if (s.condition, s.loader) == (tier, system)]
        ours = [s for s in samples if (s.condition, s.loader) == (tier, OURS)]
        seconds = spread(s.seconds for s in group)
        ratio = spread(a.seconds / b.seconds for a, b in zip(group, ours, strict=True))
        names = dict.fromkeys(name for s in group for name in s.phases_s)
        phases = (
            f"{name} {1000 * spread(s.phases_s.get(name, 0.0) for s in group).median:.1f}"
            for name in names
        )
        found.add_row(
            tier,
            system,
            f"{seconds.median:.3f}",
            f"{seconds.low:.3f}-{seconds.high:.3f}",
            f"{ratio.median:.1f}",
            f"{ratio.low:.1f}-{ratio.high:.1f}",
            ", ".join(phases),
        )
    return found


def over_load(samples: Sequence[Sample]) -> str:
    """Return what a start from SSD takes beyond its load, and what of that is the request's."""
    group = [s for s in samples if (s.condition, s.loader) == ("ssd", OURS)]
    whole = spread(s.seconds / s.phases_s["ssd"] for s in group)
    until_ready = spread((s.seconds - s.phases_s["request"]) / s.phases_s["ssd"] for s in group)
    return (
        f"from SSD a start takes {whole.median:.2f} ({whole.low:.2f} to {whole.high:.2f}) of the "
        f"load alone, until it is ready {until_ready.median:.2f} ({until_ready.low:.2f} to "
        f"{until_ready.high:.2f})"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    flags = parse_flags(argv)
    before = machine_facts()
    samples = asyncio.run(measure(flags, Console(stderr=True)))
    document = {
        "machine": {"before": before, "after": machine_facts()},
        "versions": our_versions(),
        "samples": [asdict(sample) for sample in samples],
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(document, indent=2) + "\n")
    out = Console(width=max(Console().width, 150))
    out.print(table(samples))
    out.print(over_load(samples))
    after = machine_facts()["load_average"]
    out.print(f"load average {before['load_average']} before, {after} after")


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__)
    parser.add_argument("--size", type=float, default=1.0, help="of the model, GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=4, help="of the engine")
    parser.add_argument("--directory", type=Path, default=Path("build/load"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)
