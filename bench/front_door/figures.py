"""Figures of the front-door bench: what one run measured, and what all rounds say together.

Pure: JSON text and numbers in, values out.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from bench.measuring.spread import Spread, spread

FLOOR = "direct"
"""Target without a router: what every added latency is counted from."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load."""

    is_stream: bool
    users: int
    """Clients that each have one request on the way, for the whole run."""


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What the load generator saw in one run. Latency to the answer's last byte."""

    requests: int
    failures: int
    """Requests whose answer was not the expected one, of any status."""
    duration_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

    @property
    def requests_per_s(self) -> float:
        """Answers a second over the whole run."""
        return self.requests / self.duration_s


@dataclass(frozen=True, slots=True)
class Run:
    """One target under one load in one round."""

    round_index: int
    target: str
    cell: Cell
    load: LoadFigures
    cpu_ms_per_request: Mapping[str, float] = field(default_factory=dict)
    """CPU time of each process of the target; empty where it can't be read."""


@dataclass(frozen=True, slots=True)
class CellSummary:
    """One target under one load, all rounds."""

    target: str
    cell: Cell
    failures: int
    requests_per_s: Spread
    p50_ms: Spread
    p95_ms: Spread
    p99_ms: Spread
    cpu_ms_per_request: Mapping[str, float]
    """Median over the rounds, by process."""


@dataclass(frozen=True, slots=True)
class AddedLatency:
    """What a target adds to the floor's p50 with one user, compared round by round."""

    target: str
    is_stream: bool
    added_ms: Spread


@dataclass(frozen=True, slots=True)
class Ratio:
    """One target's figures divided by another's, compared round by round."""

    target: str
    over: str
    cell: Cell
    requests_per_s: Spread
    p50_ms: Spread


def parse_load(text: str) -> LoadFigures:
    """Parse the last line that front_door.js prints. Raises ValueError when it is anything else."""
    lines = text.strip().splitlines()
    if not lines:
        raise ValueError("the load generator printed nothing")
    figures = msgspec.json.decode(lines[-1], type=LoadFigures)
    if figures.requests < 1 or figures.duration_s <= 0:
        raise ValueError("the run was too short for a single answer")
    return figures


def summarize(runs: Sequence[Run]) -> tuple[CellSummary, ...]:
    """Sum up every (target, cell) over its rounds, in the order of first appearance."""
    groups: dict[tuple[str, Cell], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.target, run.cell), []).append(run)
    return tuple(_summary(target, cell, group) for (target, cell), group in groups.items())


def added_latencies(runs: Sequence[Run]) -> tuple[AddedLatency, ...]:
    """Return what each target adds to the floor at one user, for each kind of answer."""
    found = []
    for target in dict.fromkeys(run.target for run in runs if run.target != FLOOR):
        for is_stream in dict.fromkeys(run.cell.is_stream for run in runs):
            pairs = paired(runs, target, FLOOR, Cell(is_stream, 1))
            if pairs:
                added = spread(one.load.p50_ms - floor.load.p50_ms for one, floor in pairs)
                found.append(AddedLatency(target, is_stream, added))
    return tuple(found)


def ratios(runs: Sequence[Run], target: str, over: str) -> tuple[Ratio, ...]:
    """Return `target` / `over` for every load under which both ran in the same round."""
    found = []
    for cell in dict.fromkeys(run.cell for run in runs):
        pairs = paired(runs, target, over, cell)
        if pairs:
            throughput = spread(a.load.requests_per_s / b.load.requests_per_s for a, b in pairs)
            latency = spread(a.load.p50_ms / b.load.p50_ms for a, b in pairs)
            found.append(Ratio(target, over, cell, throughput, latency))
    return tuple(found)


def paired(runs: Sequence[Run], target: str, over: str, cell: Cell) -> tuple[tuple[Run, Run], ...]:
    """Return the runs of both targets that stood in the same round under the same load."""
    by_round = {run.round_index: run for run in runs if (run.target, run.cell) == (over, cell)}
    return tuple(
        (run, by_round[run.round_index])
        for run in runs
        if (run.target, run.cell) == (target, cell) and run.round_index in by_round
    )


def _summary(target: str, cell: Cell, runs: Sequence[Run]) -> CellSummary:
    def over_rounds(figure: Callable[[LoadFigures], float]) -> Spread:
        return spread(figure(run.load) for run in runs)

    processes = dict.fromkeys(name for run in runs for name in run.cpu_ms_per_request)
    return CellSummary(
        target=target,
        cell=cell,
        failures=sum(run.load.failures for run in runs),
        requests_per_s=over_rounds(lambda load: load.requests_per_s),
        p50_ms=over_rounds(lambda load: load.p50_ms),
        p95_ms=over_rounds(lambda load: load.p95_ms),
        p99_ms=over_rounds(lambda load: load.p99_ms),
        cpu_ms_per_request={
            name: statistics.median(
                run.cpu_ms_per_request[name] for run in runs if name in run.cpu_ms_per_request
            )
            for name in processes
        },
    )
