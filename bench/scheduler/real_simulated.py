"""The traces of `real` on simulated clusters: `python -m bench.scheduler real_simulated`.

A p99 of some dozen requests says as much of the seed as of the policy, and a real cluster has time
for a few seeds only. Here the same traces come to the same cluster many times, at speeds that are
given (a start from memory, a step, as `calibrate` measures them). Beside the policies stands what
is left when every node has every model in memory: nobody waits for a disk, whoever decides, and
what remains is the wait for places. A policy that only chooses nodes can't be much better.
With `--map` it is not the traces that come but what lies around them (`real_map.py`).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measuring.spread import spread
from bench.scheduler.real_cluster import Shape
from bench.scheduler.real_map import add_map_flags, cells_of, tables_of
from bench.scheduler.real_traces import TRACES, Trace, add_trace_flags, requests_of, trace_of
from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import ModelRecord, WorkerRecord
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.start_costs import Start, StartCosts, learn_start
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.simulation.fleet.figures import quantile
from gearfall.simulation.fleet.scenario import Scenario, simulate
from gearfall.simulation.site import (
    EngineSpeed,
    ModelProfile,
    NodeProfile,
    Site,
    Timing,
    WorkerProfile,
)

RESULTS = Path(__file__).parents[1] / "results" / "scheduler_real_simulated.json"
POLICIES = ("ours", "random", "locality")
NO_DISK = "ours, all in memory"


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of the machine that is imagined."""

    start_s: float
    """From memory."""
    step_s: float
    prefill_s_per_token: float = 8e-4
    step_s_per_job: float = 2e-3
    exit_s: float = 0.15


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trace of one seed under one policy."""

    trace: str
    policy: str
    seed: int
    first_token_p99_s: float
    first_token_mean_s: float
    moves: int
    loads: float
    """From disk."""


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print a table for each trace, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.scheduler real_simulated", description=__doc__)
    parser.add_argument("--traces", nargs="+", choices=list(TRACES), default=list(TRACES))
    add_trace_flags(parser)
    add_map_flags(parser)
    parser.add_argument("--seeds", type=int, default=40, help="so many, from --seed on")
    parser.add_argument("--start-s", type=float, default=0.15, help="of a start from memory")
    parser.add_argument("--step-s", type=float, default=0.014)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    console, found = Console(), list[Outcome]()
    cells = list(cells_of(settings)) if settings.map else []
    traces = {name: trace_of(name, settings) for name in settings.traces}
    asked = {each.name: each.trace(settings.requests) for each in cells} or traces
    simulated = partial(
        _simulated, settings.seed, settings.seeds, Speeds(settings.start_s, settings.step_s)
    )
    with ProcessPoolExecutor(settings.processes) as pool:
        for name, outcomes in zip(asked, pool.map(simulated, asked.items()), strict=True):
            found += outcomes
            if not settings.map:
                console.print(f"trace {name}, load {asked[name].shape.load_s:.2f} s")
                console.print(_table(outcomes))
    for table in tables_of({each: _p99s(found, each.name) for each in cells}):
        console.print(table)
    settings.out.parent.mkdir(exist_ok=True)
    document = {
        "settings": {name: str(value) for name, value in vars(settings).items()},
        "outcomes": [asdict(each) for each in found],
    }
    settings.out.write_text(json.dumps(document, indent=1))


def scenario_of(trace: Trace, speeds: Speeds, seed: int, *, has_disk: bool = True) -> Scenario:
    """Return a trace's cluster with its requests; all starts have been seen twice before.

    Without `has_disk` every node has all models in memory.
    """
    shape = trace.shape
    if not has_disk:
        shape = replace(shape, dram_models=shape.models)
    site = _site(shape, speeds)
    requests = requests_of(trace, shape.names, shape.load_s / speeds.step_s, seed)
    policy = SchedulerPolicy(keep_alive_s=shape.keep_alive_s)
    costs = _taught(site, shape.load_s)
    return Scenario("real, simulated", site, requests, policy, seed, costs)


def _simulated(seed: int, seeds: int, speeds: Speeds, named: tuple[str, Trace]) -> list[Outcome]:
    name, trace = named
    found = (_outcomes(name, trace, speeds, each) for each in range(seed, seed + seeds))
    return [each for outcomes in found for each in outcomes]


def _p99s(found: Sequence[Outcome], name: str) -> Mapping[str, list[float]]:
    by_policy: dict[str, list[float]] = {}
    for each in found:
        if each.trace == name:
            by_policy.setdefault(each.policy, []).append(each.first_token_p99_s)
    return by_policy


def _outcomes(name: str, trace: Trace, speeds: Speeds, seed: int) -> list[Outcome]:
    scenario = scenario_of(trace, speeds, seed)
    scenarios = [(policy, policy, scenario) for policy in POLICIES]
    scenarios.append((NO_DISK, "ours", scenario_of(trace, speeds, seed, has_disk=False)))
    found = []
    for label, policy, each in scenarios:
        run = simulate(each, policy)
        first = [outcome.first_token_s for outcome in run.outcomes]
        mean_s, p99_s = sum(first) / len(first), quantile(first, 0.99)
        loads = run.tally.ssd_bytes / trace.shape.file_bytes
        found.append(Outcome(name, label, seed, p99_s, mean_s, run.tally.moves, loads))
    return found


def _site(shape: Shape, speeds: Speeds) -> Site:
    speed = EngineSpeed(
        speeds.prefill_s_per_token, speeds.step_s, speeds.step_s_per_job, start_s=speeds.start_s
    )
    models = tuple(ModelProfile(_model(name, shape.file_bytes), speed) for name in shape.names)
    nodes = [NodeId(f"node-{number}") for number in range(shape.nodes)]
    return Site(
        models=models,
        nodes=tuple(
            NodeProfile(
                node_id,
                dram_bytes=shape.pool_bytes,
                ssd_bytes=10**12,
                ssd_bytes_per_s=shape.ssd_bytes_per_s,
                remote_bytes_per_s=shape.ssd_bytes_per_s,
                on_ssd=shape.names,
                in_dram=shape.filled(number),
            )
            for number, node_id in enumerate(nodes)
        ),
        workers=tuple(
            WorkerProfile(
                WorkerRecord(
                    WorkerId(f"{node_id}-worker"),
                    node_id,
                    address="simulated",
                    device="cpu",
                    memory_bytes=10**12,
                    max_replicas=shape.places,
                    slots=shape.slots,
                )
            )
            for node_id in nodes
        ),
        timing=Timing(exit_s=speeds.exit_s),
    )


def _model(name: ModelName, size_bytes: int) -> ModelRecord:
    return ModelRecord(
        name=name,
        digest=name,
        architecture="LlamaForCausalLM",
        parameters=size_bytes // 2,
        size_bytes=size_bytes,
        context_tokens=8192,
        vocabulary_size=32_000,
        bos_token_id=1,
        eos_token_ids=(2,),
        source=f"/models/{name}",
        nodes=(),
        dtype="bfloat16",
    )


def _taught(site: Site, load_s: float) -> StartCosts:
    """Return what two starts of each model, from disk and from memory, have taught."""
    costs = StartCosts()
    for worker in site.workers:
        for model in site.models:
            for tier, moving_s in ((Tier.SSD, load_s), (Tier.DRAM, 0.0)):
                start_s = model.speed.start_s
                timeline = StartTimeline(
                    ssd_s=moving_s,
                    first_token_s=start_s,
                    total_s=moving_s + start_s,
                    from_tier=tier,
                )
                record, host = model.record, worker.record
                costs = learn_start(
                    costs,
                    Start(
                        record.name,
                        record.size_bytes,
                        host.node_id,
                        host.worker_id,
                        timeline,
                        predicted_s=0.0,
                    ),
                )
    return costs


def _table(found: Sequence[Outcome]) -> Table:
    table = Table(box=box.SIMPLE)
    columns = ("policy", "p99 s", "mean s", "p99 / ours", "median (range)", "moves", "loads")
    for name in columns:
        table.add_column(name, justify="left" if name == "policy" else "right")
    by_policy: dict[str, list[Outcome]] = {}
    for each in found:
        by_policy.setdefault(each.policy, []).append(each)
    ours = by_policy["ours"]
    for policy, outcomes in by_policy.items():
        p99_s = _mean([each.first_token_p99_s for each in outcomes])
        ratios = spread(
            each.first_token_p99_s / mine.first_token_p99_s
            for each, mine in zip(outcomes, ours, strict=True)
        )
        table.add_row(
            policy,
            f"{p99_s:.2f}",
            f"{_mean([each.first_token_mean_s for each in outcomes]):.2f}",
            f"{p99_s / _mean([each.first_token_p99_s for each in ours]):.2f}",
            f"{ratios.median:.2f} ({ratios.low:.2f}-{ratios.high:.2f})",
            f"{_mean([each.moves for each in outcomes]):.1f}",
            f"{_mean([each.loads for each in outcomes]):.1f}",
        )
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
