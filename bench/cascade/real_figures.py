"""Figures of `bench.cascade real`: what became of requests, summed up and compared. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from statistics import fmean, median

from bench.cascade.real_served import Slowness
from gearfall.simulation.fleet.figures import quantile


@dataclass(frozen=True, slots=True)
class Part:
    """One stage of a request."""

    model: str
    queued_s: float
    """Waiting for a worker."""
    engine_s: float
    """From there to its end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answered request."""

    at_s: float
    """When it was due."""
    question: int
    total_s: float
    """From then until the answer was whole."""
    quality: float
    cost: float
    """FLOPs, all stages that ran."""
    stages: int
    model: str
    """That answered."""
    gear: int
    queued_s: float = 0.0
    """Of it, waiting for a worker, in all stages."""
    engine_s: float = 0.0
    """From there to the ends of the stages."""
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One system's replay in one round, measured or simulated."""

    system: str
    round_index: int
    outcomes: tuple[Outcome, ...]
    device_s: float
    slowness: Mapping[str, Slowness] = field(default_factory=dict)
    """Of the workers while they served, by node."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A run in numbers."""

    requests: int
    quality: float
    cost: float
    """Mean of a request, FLOPs."""
    device_s: float
    """Mean of a request, of all workers."""
    p50_s: float
    p95_s: float
    p99_s: float
    stages: float
    """Mean that ran."""
    door_s: float
    """Mean outside the stages: from the client to the first one's queue, and back."""
    queued_s: float
    """Mean wait for a worker."""
    engine_s: float
    """Mean from there to the stages' ends; the three are the mean of a request."""
    p40_s: float
    p60_s: float
    one_stage: float
    """Share of answers by the first stage. Near a half, p50 lies on the step between those and the
    ones that went up: a small part more of them moves it far."""


@dataclass(frozen=True, slots=True)
class Loss:
    """How much quality a system loses against another on the same requests."""

    mean: float
    error: float
    """Standard error of the mean, over the distinct questions."""


def figures_of(run: Run) -> Figures:
    """Sum one run up. Raises ValueError without a request."""
    found = run.outcomes
    if not found:
        raise ValueError(f"{run.system} answered nothing")
    totals = [each.total_s for each in found]
    return Figures(
        requests=len(found),
        quality=fmean(each.quality for each in found),
        cost=fmean(each.cost for each in found),
        device_s=run.device_s / len(found),
        p50_s=quantile(totals, 0.50),
        p95_s=quantile(totals, 0.95),
        p99_s=quantile(totals, 0.99),
        stages=fmean(each.stages for each in found),
        door_s=fmean(each.total_s - each.queued_s - each.engine_s for each in found),
        queued_s=fmean(each.queued_s for each in found),
        engine_s=fmean(each.engine_s for each in found),
        p40_s=quantile(totals, 0.40),
        p60_s=quantile(totals, 0.60),
        one_stage=fmean(each.stages == 1 for each in found),
    )


def over_rounds(runs: Sequence[Run], system: str) -> Figures:
    """Return the median of each figure over a system's rounds."""
    found = [figures_of(run) for run in runs if run.system == system]

    def middle(figure: Callable[[Figures], float]) -> float:
        return median(figure(each) for each in found)

    return Figures(
        requests=sum(each.requests for each in found),
        quality=middle(lambda each: each.quality),
        cost=middle(lambda each: each.cost),
        device_s=middle(lambda each: each.device_s),
        p50_s=middle(lambda each: each.p50_s),
        p95_s=middle(lambda each: each.p95_s),
        p99_s=middle(lambda each: each.p99_s),
        stages=middle(lambda each: each.stages),
        door_s=middle(lambda each: each.door_s),
        queued_s=middle(lambda each: each.queued_s),
        engine_s=middle(lambda each: each.engine_s),
        p40_s=middle(lambda each: each.p40_s),
        p60_s=middle(lambda each: each.p60_s),
        one_stage=middle(lambda each: each.one_stage),
    )


def loss_of(runs: Sequence[Run], system: str, against: str) -> Loss:
    """Return what `system` loses against another, request by request in each round.

    Rounds and repeats ask the same questions greedily: they are averaged for each question first,
    for only the questions were drawn independently.
    """
    others = {run.round_index: run.outcomes for run in runs if run.system == against}
    by_question: dict[int, list[float]] = {}
    for run in (run for run in runs if run.system == system):
        for ours, theirs in zip(run.outcomes, others[run.round_index], strict=True):
            by_question.setdefault(ours.question, []).append(theirs.quality - ours.quality)
    lost = [fmean(each) for each in by_question.values()]
    mean = fmean(lost)
    spread = sqrt(fmean((each - mean) ** 2 for each in lost))
    return Loss(mean, spread / sqrt(len(lost)))


def cost_ratios(
    runs: Sequence[Run], system: str, over: str, figure: Callable[[Figures], float]
) -> tuple[float, ...]:
    """Return by round how much less `system` has of a figure than `over`."""
    others = {run.round_index: run for run in runs if run.system == over}
    return tuple(
        figure(figures_of(others[run.round_index])) / figure(figures_of(run))
        for run in runs
        if run.system == system
    )


@dataclass(frozen=True, slots=True)
class Moment:
    """What a system did with the requests that came in one piece of time."""

    at_s: float
    """Its middle."""
    per_s: float
    p95_s: float
    quality: float
    gear: float
    """Mean over its requests."""


def moments(outcomes: Sequence[Outcome], piece_s: float) -> tuple[Moment, ...]:
    """Return the pieces of time in which something came."""
    pieces: dict[int, list[Outcome]] = {}
    for each in outcomes:
        pieces.setdefault(int(each.at_s / piece_s), []).append(each)
    return tuple(
        Moment(
            (number + 0.5) * piece_s,
            len(found) / piece_s,
            quantile([each.total_s for each in found], 0.95),
            fmean(each.quality for each in found),
            fmean(each.gear for each in found),
        )
        for number, found in sorted(pieces.items())
    )


def busiest(outcomes: Sequence[Outcome], piece_s: float) -> tuple[Outcome, ...]:
    """Return the requests of the fifth of the time in which most came."""
    pieces: dict[int, list[Outcome]] = {}
    for each in outcomes:
        pieces.setdefault(int(each.at_s / piece_s), []).append(each)
    order = sorted(pieces.values(), key=len, reverse=True)
    return tuple(each for found in order[: ceil(len(order) / 5)] for each in found)


@dataclass(frozen=True, slots=True)
class Miss:
    """How far a prediction was from what came: relative, positive where it was too much."""

    p50: float
    p95: float
    p99: float
    cost: float
    device: float

    def within(self, limits: Mapping[str, float]) -> bool:
        """Whether no named figure is off by more than its limit."""
        return all(abs(getattr(self, name)) <= limit for name, limit in limits.items())


def miss_of(predicted: Figures, measured: Figures) -> Miss:
    """Return the prediction's errors, as shares of what was measured."""
    return Miss(
        predicted.p50_s / measured.p50_s - 1.0,
        predicted.p95_s / measured.p95_s - 1.0,
        predicted.p99_s / measured.p99_s - 1.0,
        predicted.cost / measured.cost - 1.0,
        predicted.device_s / measured.device_s - 1.0,
    )
