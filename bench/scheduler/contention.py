"""Several models want the same places: who gets them, by three rules on the same instances.

Each instance has empty workers, one a node, whose stores hold some models in memory and some on
SSD, and models that are all asked for at once. The cost of an outcome is the waiting jobs times the
predicted seconds of the place that their model got, summed up; no place counts as a minute. The
least possible is found by a min-cost assignment (the Hungarian method of SciPy).
"""

import argparse
import time
from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from gearfall.core.ids import ModelName, NodeId, RouterId, WorkerId
from gearfall.core.records import DemandRecord, ModelRecord, NodeRecord, WorkerRecord
from gearfall.scheduling.actions import Assign
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.placement.contention import NOWHERE_S
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.scene import Scene, predict

_GB = 10**9
_POLICY = SchedulerPolicy()
_NOW_UNIX_S = 1000.0
_IN_DRAM, _ON_SSD = 2, 5
"""Models that a node has in each tier."""

Outcome = dict[ModelName, WorkerId]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.scheduler contention")
    parser.add_argument("--workers", type=int, default=40)
    parser.add_argument("--models", type=int, nargs="+", default=[10, 20, 40, 60])
    parser.add_argument("--instances", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    settings = parser.parse_args(argv)
    table = Table(title=f"{settings.workers} workers, cost over the least possible (mean, worst)")
    for column in ("models", "first come", "ours", "ms: first come", "ours", "min-cost"):
        table.add_column(column, justify="right")
    for models in settings.models:
        random = Random(settings.seed)
        found = [_compare(settings.workers, models, random) for _ in range(settings.instances)]
        table.add_row(str(models), *_figures(found))
    Console().print(table)


def _compare(workers: int, models: int, random: Random) -> tuple[tuple[float, float], ...]:
    """Return (cost, milliseconds) of first come, ours and the least possible."""
    records = _records(workers, models, random)
    fleet = _fleet(records)
    names = [each.name for each in fleet.records.models.values()]
    jobs = {name: random.choice((1, 1, 1, 2, 4, 8)) for name in names}
    costs = _cost_matrix(fleet, names, jobs)
    spent = []
    for rule in (_first_come, _ours):
        began_s = time.perf_counter()
        outcome = rule(_fleet(records), names, jobs)
        spent.append((_cost(fleet, outcome, names, jobs), 1e3 * (time.perf_counter() - began_s)))
    began_s = time.perf_counter()
    rows, columns = linear_sum_assignment(costs)
    least = float(costs[rows, columns].sum())
    return (*spent, (least, 1e3 * (time.perf_counter() - began_s)))


def _records(workers: int, models: int, random: Random) -> list[tuple[str, object]]:
    names = [ModelName(f"m{number}") for number in range(models)]
    held = {
        NodeId(f"n{number}"): random.sample(names, _IN_DRAM + _ON_SSD) for number in range(workers)
    }
    records: list[tuple[str, object]] = []
    for node_id, has in held.items():
        records.append(("nodes", _node(node_id, has, random)))
        worker_id = WorkerId(f"w-{node_id}")
        made = WorkerRecord(worker_id, node_id, "127.0.0.1:2", "cuda:0", 80 * _GB, 1)
        records.append(("workers", made))
    for name in names:
        holders = tuple(node_id for node_id, has in held.items() if name in has)
        records.append(("models", _model(name, holders, random)))
    return records


def _node(node_id: NodeId, has: list[ModelName], random: Random) -> NodeRecord:
    return NodeRecord(
        node_id,
        "127.0.0.1:1",
        "/run/store.sock",
        256 * _GB,
        0,
        random.uniform(2, 7) * _GB,
        tuple(has[:_IN_DRAM]),
        random.uniform(0.5, 1.5) * _GB,
        on_ssd=tuple(has),
    )


def _model(name: ModelName, holders: tuple[NodeId, ...], random: Random) -> ModelRecord:
    size_bytes = random.choice((3, 7, 13, 26)) * _GB
    facts = ("d" * 32, "LlamaForCausalLM", size_bytes // 2, size_bytes, 4096, 32_000)
    return ModelRecord(name, *facts, 1, (2,), f"s3://models/{name}", holders, "bfloat16")


def _fleet(records: list[tuple[str, object]]) -> Fleet:
    fleet = Fleet()
    for kind, record in records:
        fleet.put(kind, record)
    fleet.refresh(_POLICY, _NOW_UNIX_S)
    return fleet


def _demand(name: ModelName, jobs: int, since: float) -> DemandRecord:
    return DemandRecord(name, RouterId("r"), jobs, since)


def _first_come(fleet: Fleet, names: list[ModelName], jobs: dict[ModelName, int]) -> Outcome:
    """Each model takes the best place that is left, in the order of asking."""
    outcome: Outcome = {}
    for number, name in enumerate(names):
        fleet.put("demand", _demand(name, jobs[name], _NOW_UNIX_S - 1 + number / 1000))
        outcome |= _decide(fleet)
    return outcome


def _ours(fleet: Fleet, names: list[ModelName], jobs: dict[ModelName, int]) -> Outcome:
    for number, name in enumerate(names):
        fleet.put("demand", _demand(name, jobs[name], _NOW_UNIX_S - 1 + number / 1000))
    return _decide(fleet)


def _decide(fleet: Fleet) -> Outcome:
    plan = decide(fleet, StartCosts(), _POLICY, _NOW_UNIX_S)
    found = [action.assignment for action in plan.actions if isinstance(action, Assign)]
    for assignment in found:
        fleet.put("assignments", assignment)
    return {each.model: each.worker_id for each in found}


def _seconds(fleet: Fleet, name: ModelName, worker_id: WorkerId) -> float:
    scene = Scene(fleet, StartCosts(), _POLICY, _NOW_UNIX_S)
    node_id = fleet.records.workers[worker_id].node_id
    start = predict(scene, fleet.records.models[name], node_id)
    return NOWHERE_S if start is None else start.total_s


def _cost(
    fleet: Fleet, outcome: Outcome, names: list[ModelName], jobs: dict[ModelName, int]
) -> float:
    return sum(
        jobs[name] * (_seconds(fleet, name, outcome[name]) if name in outcome else NOWHERE_S)
        for name in names
    )


def _cost_matrix(
    fleet: Fleet, names: list[ModelName], jobs: dict[ModelName, int]
) -> NDArray[np.float64]:
    """Return the cost of each model (row) at each worker, and as many columns of no place."""
    workers = list(fleet.records.workers)
    there = [[jobs[name] * _seconds(fleet, name, each) for each in workers] for name in names]
    nowhere = [[jobs[name] * NOWHERE_S] * len(names) for name in names]
    return np.concatenate([np.array(there), np.array(nowhere)], axis=1)


def _figures(found: list[tuple[tuple[float, float], ...]]) -> list[str]:
    figures = np.array(found)
    over = figures[:, :2, 0] / figures[:, 2:, 0]
    cells = [f"{over[:, rule].mean():.3f}, {over[:, rule].max():.3f}" for rule in (0, 1)]
    return cells + [f"{np.median(figures[:, rule, 1]):.1f}" for rule in (0, 1, 2)]
