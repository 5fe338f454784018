"""How fast a cluster was while it served: its engines' steps beside the same steps of the profile.

What requests waited for is not in it. In each piece of time, for each worker,

    slowness = processor time of its engines' steps / how long steps of the same model and so many
               tokens took while the profile was measured, one engine at a time
               * time with a step under way / processor time of the worker meanwhile

The first factor is the machine's clock and caches, the second what others took of the worker's
core: its own engines and its host share that core, and what they took from each other is its own.
What others took while the profile was measured is in the profile's speeds, and so in both. Pure.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from bench.cascade.real_machine import MachineSample
from services.worker.engine.step_log import LoggedStep

MIN_LOOKS = 5
"""Steps of a shape in the profile without which it says nothing."""
MIN_WORK_S = 0.03
"""Of a piece of time; with less of it the worker is as slow as it was."""
MOST_TAKEN = 0.8
"""Of its core that others are taken to have had."""

Shape = tuple[str, int]
"""A model and the tokens of a step."""
Slowness = tuple[tuple[float, float], ...]
"""(from when, how many times as long as in the profile), by rising times."""


@dataclass(frozen=True, slots=True)
class WorkerStep:
    """One step of one of a worker's engines."""

    model: str
    step: LoggedStep

    @property
    def shape(self) -> Shape:
        """What steps that should take the same time have in common."""
        return self.model, self.step.tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of time of one worker, on the monotonic clock."""

    begin_s: float
    end_s: float
    host_s: float
    """Processor time of the worker's host process."""


def steps_by_node(
    logs: Mapping[int, Sequence[LoggedStep]], engines: Mapping[int, tuple[str, str]]
) -> Mapping[str, Sequence[WorkerStep]]:
    """Return the steps of each node's worker; `engines`: (node, model) by process id, of those in
    `logs` that computed anything."""
    found: dict[str, list[WorkerStep]] = {}
    for pid, steps in logs.items():
        if steps:
            node, model = engines[pid]
            found.setdefault(node, []).extend(WorkerStep(model, each) for each in steps)
    return found


def pieces_of(samples: Sequence[MachineSample], node: str) -> tuple[Piece, ...]:
    """Return the time between each two samples."""
    return tuple(
        Piece(
            one.at_s,
            other.at_s,
            max(0.0, other.processes[node].run_s - one.processes[node].run_s),
        )
        for one, other in pairwise(samples)
    )


def mean_slowness(by_node: Mapping[str, Slowness]) -> float:
    """Return the mean over workers and pieces of one length."""
    return fmean(factor for found in by_node.values() for _, factor in found)


def references(steps: Iterable[WorkerStep]) -> Mapping[Shape, float]:
    """Return the median seconds of each shape that was met often enough."""
    found: dict[Shape, list[float]] = {}
    for each in steps:
        found.setdefault(each.shape, []).append(each.step.step_s)
    return {shape: median(took) for shape, took in found.items() if len(took) >= MIN_LOOKS}


def slowness(
    steps: Sequence[WorkerStep],
    pieces: Sequence[Piece],
    known: Mapping[Shape, float],
    begun_s: float,
) -> Slowness:
    """Return how slow a worker was in each piece, 1 before its first work, in seconds since
    `begun_s`; a step counts where it ended."""
    ordered = sorted(steps, key=lambda each: each.step.end_s)
    found, last, place = [], 1.0, 0
    for piece in pieces:
        here = []
        while place < len(ordered) and ordered[place].step.end_s <= piece.end_s:
            if ordered[place].step.end_s > piece.begin_s:
                here.append(ordered[place])
            place += 1
        last = _slow_in(here, piece, known) or last
        found.append((piece.begin_s - begun_s, last))
    return tuple(found)


def _slow_in(here: Sequence[WorkerStep], piece: Piece, known: Mapping[Shape, float]) -> float:
    """Return a piece's slowness, 0 where too little was computed to know."""
    alike = [each for each in here if each.shape in known]
    expected_s = sum(known[each.shape] for each in alike)
    if expected_s < MIN_WORK_S:
        return 0.0
    slower = sum(each.step.core_s for each in alike) / expected_s
    return slower / (1.0 - taken_share(here, piece.host_s))


def taken_share(here: Sequence[WorkerStep], host_s: float) -> float:
    """Return what others had of the worker's core while one of its engines was in a step."""
    covered_s = sum(end_s - begin_s for begin_s, end_s in _united(here))
    own_s = sum(each.step.core_s for each in here) + host_s
    return min(MOST_TAKEN, max(0.0, 1.0 - own_s / covered_s)) if covered_s else 0.0


def _united(here: Sequence[WorkerStep]) -> Iterator[tuple[float, float]]:
    """Yield the times in which at least one step was under way."""
    spans = sorted((each.step.end_s - each.step.step_s, each.step.end_s) for each in here)
    begin_s, end_s = spans[0] if spans else (0.0, 0.0)
    for next_s, last_s in spans[1:]:
        if next_s > end_s:
            yield begin_s, end_s
            begin_s, end_s = next_s, last_s
        end_s = max(end_s, last_s)
    yield begin_s, end_s
