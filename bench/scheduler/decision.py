"""How long one decision takes: a changed record put, and everything that follows from it decided.

Each node has four workers with room for one replica each, which is harder than one worker with room
for four: there are four times as many places to look at. Nine in ten workers host something, three
in four of all run jobs. Then a steady stream: models are asked for that nobody hosts, or not
enough, starts get ready, replicas go idle and get work, jobs make progress, stores say what they
have, what was given back leaves. Every change is one sample, `put` and `decide` together; so is
every round in which the fleet hears what the last decision wrote (`written`). Wall time, and the
thread's processor time beside it, which other work on the machine disturbs less.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.scheduler.decision_fleet import WORKERS_PER_NODE, Change, Stream, make_fleet
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.reconcile import Plan, decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy

SIZES = ((100, 1_000), (1_000, 3_000), (10_000, 10_000))
_SETTLE_EVENTS = 300
_POLICY = SchedulerPolicy()
_COSTS = StartCosts()

Samples = dict[str, list[tuple[float, float]]]
"""Milliseconds by kind of change: wall time, processor time."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.scheduler decision")
    parser.add_argument("--events", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--largest", type=int, default=10_000, help="most nodes")
    settings = parser.parse_args(argv)
    table = Table(title=f"put + decide in ms, {settings.events:,} changes each")
    columns = ("nodes", "workers", "models", "kind", "samples", "p50", "p99", "max")
    for column in (*columns, "cpu p50", "cpu p99", "cpu max"):
        table.add_column(column, justify="right")
    for nodes, models in SIZES:
        if nodes > settings.largest:
            continue
        samples = _measure(nodes, models, settings.events, settings.seed)
        size = (f"{nodes:,}", f"{nodes * WORKERS_PER_NODE:,}", f"{models:,}")
        table.add_row(*size, "all", *_figures([ms for kind in samples.values() for ms in kind]))
        for kind, measured in sorted(samples.items()):
            table.add_row("", "", "", kind, *_figures(measured))
        table.add_section()
    Console(width=120).print(table)


def _measure(nodes: int, models: int, events: int, seed: int) -> Samples:
    random = Random(seed)
    fleet = make_fleet(nodes, models, random)
    stream = Stream(fleet, random)
    samples: Samples = {}
    _settle(fleet, stream)
    gc.collect()
    gc.freeze()
    for number in range(events + _SETTLE_EVENTS):
        if number == _SETTLE_EVENTS:
            samples.clear()
        kind, change = stream.next_change()
        _play(fleet, stream, kind, [change], samples)
    gc.unfreeze()
    fleet.check()
    return samples


def _settle(fleet: Fleet, stream: Stream) -> None:
    """Have the fleet decide what it finds at the beginning, which every new leader does once.

    Who stood by has the rows already; who begins from nothing makes them, and the index, first.
    """
    anew_ms = _processor_ms(lambda: Fleet.of(fleet.records.as_snapshot()))
    rows_ms = _processor_ms(lambda: fleet.keep_warm(_POLICY, stream.now_unix_s))
    fleet.look_at_all()
    plans: list[Plan] = []
    first_ms = _processor_ms(
        lambda: plans.append(decide(fleet, _COSTS, _POLICY, stream.now_unix_s))
    )
    (plan,) = plans
    print(f"first decision of who stood by: {first_ms:.0f} ms; ", end="")
    print(f"before it, for who did not: index {anew_ms:.0f} ms, rows {rows_ms:.0f} ms (processor)")
    for change in stream.carry_out(plan):
        change.put_to(fleet)


def _processor_ms(work: Callable[[], object]) -> float:
    began_s = time.thread_time()
    work()
    return 1e3 * (time.thread_time() - began_s)


def _play(fleet: Fleet, stream: Stream, kind: str, changes: list[Change], samples: Samples) -> None:
    """Put changes and decide, until what was decided leads to nothing more."""
    for _ in range(16):
        # Wall time inside, as the other clock takes a while to be read.
        began_cpu_s, began_s = time.thread_time(), time.perf_counter()
        for change in changes:
            change.put_to(fleet)
        plan = decide(fleet, _COSTS, _POLICY, stream.now_unix_s)
        wall_s, cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
        samples.setdefault(kind, []).append((1e3 * wall_s, 1e3 * cpu_s))
        if not plan.actions:
            return
        kind, changes = "written", stream.carry_out(plan)
    raise AssertionError("decides for ever though nothing changes")


def _figures(samples: list[tuple[float, float]]) -> tuple[str, ...]:
    found = np.quantile(np.array(samples), (0.5, 0.99, 1.0), axis=0)
    return (f"{len(samples):,}", *(f"{each:.3f}" for each in found.T.flatten()))
