"""Shares and triggers of a gear on a real cluster: `python -m bench.cascade claims`.

Two nodes of one worker, each with a replica of one demo model. Open-loop load at several rates,
the arms one after the other in every round:
- shares: which part of the jobs each node really ran, from the workers' own counters, and whether
  leaving jobs to others costs latency;
- triggers: whether waiting for a batch before an idle engine begins lowers what a job costs the
  workers' processors, or its latency.
"""

import argparse
import asyncio
import json
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measuring.cpu_time import cpu_seconds
from bench.measuring.machine import machine_facts, our_versions
from gearfall.client import AsyncClient
from gearfall.core.gears.gear_plan import Gear, GearPlan, PlacedReplicas, Promise, plan_text
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.demo.catalogue import MODELS, checkpoint_path
from gearfall.infra.local.cluster_file import ServiceFacts
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings
from gearfall.pb import common_pb2

RESULTS = Path(__file__).parents[1] / "results" / "cascade_claims.json"
NAME = DeploymentName("spread")
MODEL = ModelName(MODELS[-1])
NODES = ("node-1", "node-2")
TOLERANCE = 0.05
"""What a node's part of the jobs may differ from its share."""
_LOOK_AGAIN_S = 0.05
_READY_S = 60.0
_ENDED = re.compile(r"^gearfall_worker_jobs_ended_total\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Arm:
    """What the gear says."""

    name: str
    share: float | None = None
    """Of the first node."""
    trigger: int = 1


ARMS = (
    Arm("no shares"),
    Arm("0.5 / 0.5", 0.5),
    Arm("0.75 / 0.25", 0.75),
    Arm("0.9 / 0.1", 0.9),
    Arm("trigger 2", trigger=2),
    Arm("trigger 4", trigger=4),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One arm at one rate."""

    arm: str
    rate: float
    requests: int
    share: float
    """Of the first node, as its worker counted."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    worker_ms_per_request: float
    """Processor time of both workers and their engines."""


@dataclass(frozen=True, slots=True)
class _Load:
    """What is sent."""

    rate: float
    seconds: float
    tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class _Site:
    """A running cluster."""

    client: AsyncClient
    workers: Mapping[str, ServiceFacts] = field(default_factory=dict)
    """By node."""

    async def ended(self) -> dict[str, int]:
        """Return how many jobs each node's worker has ended."""
        counts = {}
        for node, facts in self.workers.items():
            text = await asyncio.to_thread(_fetch, f"http://{facts.metrics}/metrics")
            counts[node] = round(sum(float(each) for each in _ENDED.findall(text)))
        return counts

    def busy_s(self) -> float:
        """Return the processor time of all workers so far."""
        pids = {node: facts.pid for node, facts in self.workers.items() if facts.pid is not None}
        return sum(cpu_seconds(pids).values())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.cascade claims", description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0, 40.0, 80.0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each arm at each rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--slots", type=int, default=32, help="jobs at once of a replica")
    parser.add_argument("--arms", nargs="+", choices=[each.name for each in ARMS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    runs = asyncio.run(_measure(settings))
    _print(runs)
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "tolerance": TOLERANCE,
        "runs": [asdict(each) for each in runs],
    }
    settings.out.parent.mkdir(exist_ok=True)
    settings.out.write_text(json.dumps(document, indent=1))


async def _measure(settings: argparse.Namespace) -> list[Run]:
    with tempfile.TemporaryDirectory(prefix="gearfall-claims-") as scratch:
        cluster = LocalCluster(
            LocalClusterSettings(
                runtime_dir=Path(scratch) / "run",
                data_dir=Path(scratch) / "data",
                rest_listen="127.0.0.1:0",
                grpc_listen="127.0.0.1:0",
                nodes=len(NODES),
                dram_bytes=2**28,
                memory_bytes=2**30,
                slots=settings.slots,
                log_level="WARNING",
            )
        )
        await cluster.start()
        try:
            async with AsyncClient(cluster.grpc_address) as client:
                async for _ in client.register_model(str(MODEL), str(checkpoint_path(MODEL))):
                    pass
                found = [each for each in cluster.describe().services if each.service == "worker"]
                site = _Site(client, dict(zip(NODES, found, strict=True)))
                return await _rounds(site, settings)
        finally:
            await cluster.stop()


async def _rounds(site: _Site, settings: argparse.Namespace) -> list[Run]:
    runs, version = [], 0
    arms = [each for each in ARMS if not settings.arms or each.name in settings.arms]
    await _deploy(site, Arm("warm"), 1)
    await _run(site, Arm("warm"), _Load(settings.rates[0], 1.0, settings.tokens, 0))
    for number in range(settings.rounds):
        for rate in settings.rates:
            for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
                version += 1
                await _deploy(site, arm, version + 1)
                load = _Load(rate, settings.seconds, settings.tokens, number)
                runs.append(await _run(site, arm, load))
    return runs


async def _deploy(site: _Site, arm: Arm, version: int) -> None:
    """Put the plan and return when both of its replicas are ready."""
    first = {} if arm.share is None else {NODES[0]: arm.share, NODES[1]: 1.0 - arm.share}
    stages = (Stage(MODEL),)
    gear = Gear(
        1e9,
        stages,
        Promise(0.9, 0.0, 0.1, 0, 1.0, 0.0, (1.0,)),
        triggers={str(MODEL): arm.trigger},
        shares={str(MODEL): first} if first else {},
    )
    plan = GearPlan(
        *(str(NAME), version, time.time(), arm.name, "FLOP", {str(MODEL): ""}, (gear,)),
        placement=tuple(PlacedReplicas(node, str(MODEL), 1) for node in NODES),
    )
    record = DeploymentRecord(NAME, stages, max_replicas=len(NODES))
    await site.client.deploy(record, gear_plan=plan_text(plan))
    async with asyncio.timeout(_READY_S):
        await _both_ready(site.client)


async def _both_ready(client: AsyncClient) -> None:
    while True:
        if await _ready(client) == len(NODES):
            return
        await asyncio.sleep(_LOOK_AGAIN_S)


async def _ready(client: AsyncClient) -> int:
    return sum(
        replica.state == common_pb2.REPLICA_STATE_READY
        for worker in (await client.status()).workers
        for replica in worker.replicas
    )


async def _run(site: _Site, arm: Arm, load: _Load) -> Run:
    """Send requests at random times, whatever became of the others."""
    draw, took_s = Random(load.seed), list[float]()
    before, busy_s = await site.ended(), site.busy_s()
    due_s, end_s = time.perf_counter(), time.perf_counter() + load.seconds

    async def ask(at_s: float, prompt: str) -> None:
        await asyncio.sleep(at_s - time.perf_counter())
        await site.client.generate(
            NAME, prompt, max_tokens=load.tokens, ignore_eos=True, temperature=0.0
        )
        took_s.append(time.perf_counter() - at_s)

    async with asyncio.TaskGroup() as tasks:
        while (due_s := due_s + draw.expovariate(load.rate)) < end_s:
            prompt = f"{draw.randrange(10**4)}+{draw.randrange(10**4)}="
            tasks.create_task(ask(due_s, prompt))
    after = await site.ended()
    ran = {node: after[node] - before[node] for node in NODES}
    took_s.sort()
    p50, p95, p99 = (took_s[min(len(took_s) - 1, int(q * len(took_s)))] for q in (0.5, 0.95, 0.99))
    return Run(
        arm.name,
        load.rate,
        len(took_s),
        ran[NODES[0]] / max(1, sum(ran.values())),
        *(1e3 * p50, 1e3 * p95, 1e3 * p99),
        1e3 * (site.busy_s() - busy_s) / len(took_s),
    )


def _print(runs: Sequence[Run]) -> None:
    table = Table("arm", "rate/s", "requests", "first node's part", box=box.SIMPLE)
    for name in ("p50 ms", "p95 ms", "p99 ms", "worker ms/request"):
        table.add_column(name, justify="right")
    for rate in sorted({each.rate for each in runs}):
        for arm in ARMS:
            mine = [each for each in runs if (each.arm, each.rate) == (arm.name, rate)]
            if mine:
                table.add_row(*_row(arm, mine))
    Console().print(table)


def _row(arm: Arm, runs: Sequence[Run]) -> list[str]:
    """Medians over rounds; of the parts the range, and whether all are near the share."""
    parts = [each.share for each in runs]
    said = f"{min(parts):.2f} to {max(parts):.2f}"
    if arm.share is not None:
        is_near = all(abs(part - arm.share) <= TOLERANCE for part in parts)
        said += f" (+-{TOLERANCE:g} {'met' if is_near else 'missed'})"
    medians = [
        statistics.median(getattr(each, name) for each in runs)
        for name in ("p50_ms", "p95_ms", "p99_ms", "worker_ms_per_request")
    ]
    requests = sum(each.requests for each in runs)
    return [arm.name, f"{runs[0].rate:g}", str(requests), said, *(f"{v:.1f}" for v in medians)]


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as reply:
        return bytes(reply.read()).decode()


if __name__ == "__main__":
    main()
