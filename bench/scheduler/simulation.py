"""Policies side by side in simulated fleets: `python -m bench.scheduler simulation`.

ServerlessLLM's setting (docs/simulation.md), each model size and dataset at several rates and
seeds, in both ways to read it: many models at once and one answer at a time on each replica
(fleet), or bursts for each model and as many answers at once as fit (model); with memory as it is
taken to be, and with memory for one copy of each model. Then fleets of growing size under our
policy. Ratios are of p99 startup to ours, the median over the seeds with the
smallest and largest; for preemption also with what a request waits after it was stopped.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import spread
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.simulation.arrivals import Bursts, Lengths, Load, bursty_requests
from gearfall.simulation.fleet.figures import Figures, figures_of
from gearfall.simulation.fleet.fleet_setting import FleetShape, fleet_site
from gearfall.simulation.fleet.scenario import Scenario, simulate
from gearfall.simulation.fleet.serverlessllm import serverlessllm

RESULTS = Path(__file__).parents[1] / "results" / "scheduler_simulation.json"
POLICIES = ("ours", "random", "least-loaded", "locality", "preempt")
LOCALITY_FREE = ("random", "least-loaded")
SLO_S = 5.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting under one seed, by policy."""

    size: str
    dataset: str
    per_s: float
    bursts: str
    dram_copies: int
    seed: int
    figures: tuple[Figures, ...]

    @property
    def setting(self) -> str:
        """All but the seed."""
        memory = f", {self.dram_copies} in memory" if self.dram_copies else ""
        return f"OPT-{self.size} {self.dataset} {self.per_s:g}/s, {self.bursts}{memory}"

    def ratio(self, policy: str, field: str = "startup_p99_s") -> float:
        """Return a policy's figure over ours."""
        by_policy = {each.policy: each for each in self.figures}
        ours = getattr(by_policy["ours"], field)
        return float(getattr(by_policy[policy], field) / max(ours, 1e-3))


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a fleet of one size is simulated."""

    nodes: int
    models: int
    requests: int
    events: int
    decisions: int
    wall_s: float

    @property
    def events_per_s(self) -> float:
        """Of real time, decisions included."""
        return self.events / self.wall_s


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print tables, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.scheduler simulation", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["6.7b"])
    parser.add_argument("--datasets", nargs="+", default=["gsm8k", "sharegpt"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--dram-copies", nargs="+", type=int, default=[0, 1], help="of each model; 0: 256 GB a node"
    )
    parser.add_argument("--duration", type=float, default=600.0, help="simulated seconds")
    parser.add_argument("--nodes", nargs="*", type=int, default=[10, 100, 1000, 10_000])
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    console = Console(width=max(Console().width, 130))
    cells = [
        _cell(size, dataset, rate, bursts, seed=seed, copies=copies, duration_s=settings.duration)
        for size in settings.sizes
        for dataset in settings.datasets
        for rate in settings.rates
        for bursts in Bursts
        for copies in settings.dram_copies
        for seed in settings.seeds
    ]
    console.print(_ratios(cells))
    speeds = [_speed(nodes) for nodes in settings.nodes]
    console.print(_speeds(speeds))
    settings.out.parent.mkdir(exist_ok=True)
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "settings": {name: str(value) for name, value in vars(settings).items()},
        "cells": [asdict(each) for each in cells],
        "speeds": [{**asdict(each), "events_per_s": each.events_per_s} for each in speeds],
    }
    settings.out.write_text(json.dumps(document, indent=1))


def _cell(
    size: str,
    dataset: str,
    per_s: float,
    bursts: Bursts,
    *,
    seed: int,
    copies: int,
    duration_s: float,
) -> Cell:
    scenario = serverlessllm(
        size,
        dataset,
        per_s=per_s,
        duration_s=duration_s,
        slots=1 if bursts is Bursts.FLEET else 0,
        seed=seed,
        bursts=bursts,
        dram_copies=copies,
    )
    figures = tuple(figures_of(simulate(scenario, policy), SLO_S) for policy in POLICIES)
    return Cell(size, dataset, per_s, bursts.value, copies, seed, figures)


def _ratios(cells: Sequence[Cell]) -> Table:
    table = Table(box=box.SIMPLE)
    for name in (
        *("setting", "ours p50 s", "ours p99 s", "/ random", "/ least-loaded", "/ locality"),
        *("/ preempt", "/ preempt, with restarts", "preempted (most)", "moved by ours"),
    ):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for key in dict.fromkeys(each.setting for each in cells):
        group = [each for each in cells if each.setting == key]
        ours = [each.figures[0] for each in group]
        preempt = [each.figures[POLICIES.index("preempt")] for each in group]
        table.add_row(
            key,
            f"{spread(each.startup_p50_s for each in ours).median:.2f}",
            f"{spread(each.startup_p99_s for each in ours).median:.2f}",
            *(_spread(group, policy) for policy in (*LOCALITY_FREE, "locality", "preempt")),
            _spread(group, "preempt", "waited_p99_s"),
            f"{sum(p.preempted for p in preempt)} ({max(p.most_preempted for p in preempt)})",
            str(sum(each.moved for each in ours)),
        )
    return table


def _spread(group: Sequence[Cell], policy: str, field: str = "startup_p99_s") -> str:
    found = spread(each.ratio(policy, field) for each in group)
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def _speed(nodes: int) -> Speed:
    """Simulate a minute of a fleet with as many models as nodes, at least a hundred."""
    models = max(100, nodes)
    site = fleet_site(FleetShape(nodes=nodes, models=models))
    load = Load(
        max(5.0, nodes / 20), 60.0, 4.0, Lengths(300, 1.0, 4000), Lengths(150, 1.0, 1000), 0.9
    )
    names = [each.record.name for each in site.models]
    requests = bursty_requests(0, names, load)
    scenario = Scenario(f"{nodes} nodes", site, requests, SchedulerPolicy())
    begun_s = time.perf_counter()
    tally = simulate(scenario, "ours").tally
    wall_s = time.perf_counter() - begun_s
    return Speed(nodes, models, len(requests), tally.events, tally.decisions, wall_s)


def _speeds(speeds: Sequence[Speed]) -> Table:
    table = Table(box=box.SIMPLE)
    for name in ("nodes", "models", "requests", "events", "decisions", "wall s", "events/s"):
        table.add_column(name, justify="right")
    for each in speeds:
        counts = (each.nodes, each.models, each.requests, each.events, each.decisions)
        table.add_row(*map(str, counts), f"{each.wall_s:.1f}", f"{each.events_per_s:.0f}")
    return table
