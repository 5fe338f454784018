"""What recorded starts have taught: the time of a load by its size, and of all that follows it.

Every figure is a median of the newest few, or the line of least relative error through them
(`robust_line.py`), so that single starts that met a busy disk or a swapping machine move nothing.
Repeats of a start differ by noise that has no memory: what is averaged over is as much as a lasting
change may take to be followed (docs/decisions/0026).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.robust_line import Line, Point, line_through

UNKNOWN_FIXED_S = 1.0
"""Assumed until a start was recorded."""
ANY_NODE = NodeId("")
KEPT_OUTCOMES = 256
NEWEST = 5
"""Starts of one model out of one tier on one node that its fixed time is the median of."""
NEWEST_LOADS = 16
"""Loads out of one tier of one node that its line goes through."""
MIN_LOADS = 4
NEWEST_BY_SIZE = 32
"""Starts of any model that the guess for a model never started is made from."""
ENOUGH = 2
"""Starts on a node itself before those on other nodes no longer count."""
UNKNOWN_CANARY = Line(0.3, 0.0)
"""From an assignment to a new model's canary, assumed until a start waited for one."""
CANARY_WAIT_S = 0.1
"""A longer `prepare` waited for the canary; one that is there is read in milliseconds."""
NEWEST_CANARIES = 12

FixedKey = tuple[ModelName, Tier, NodeId]
"""ANY_NODE stands for all nodes together."""
LoadKey = tuple[NodeId, Tier]


@dataclass(frozen=True, slots=True)
class StartOutcome:
    """One start as it was predicted and as it went."""

    model: ModelName
    worker_id: WorkerId
    predicted_s: float
    measured_s: float
    from_tier: Tier = Tier.SSD
    size_bytes: int = 0
    fixed_s: float = 0.0
    """Of the measured time, what was not spent on moving or on waiting for other loads."""

    @property
    def error(self) -> float:
        """|predicted - measured| / measured."""
        return abs(self.predicted_s - self.measured_s) / max(self.measured_s, 1e-9)


@dataclass(frozen=True, slots=True)
class StartCosts:
    """All that is known; a new value after each start."""

    fixed: Mapping[FixedKey, tuple[float, ...]] = field(default_factory=dict)
    """Seconds of the newest starts beside moving bytes and waiting, oldest first."""
    loads: Mapping[LoadKey, tuple[Point, ...]] = field(default_factory=dict)
    """(bytes, seconds) of the newest loads that moved bytes, oldest first."""
    by_size: Mapping[Tier, Line] = field(default_factory=dict)
    """Fixed time over a model's size, for a model that never started."""
    load_lines: Mapping[LoadKey, Line] = field(default_factory=dict)
    """Through `loads`; none where they are too few."""
    outcomes: tuple[StartOutcome, ...] = ()
    """Oldest first, at most KEPT_OUTCOMES."""
    canaries: tuple[Point, ...] = ()
    """(bytes, seconds) from the assignment to the canary of starts that waited for it."""
    canary_line: Line = UNKNOWN_CANARY
    """Through `canaries`."""


@dataclass(frozen=True, slots=True)
class Start:
    """A start that ended in a ready replica."""

    model: ModelName
    size_bytes: int
    node_id: NodeId
    worker_id: WorkerId
    timeline: StartTimeline
    predicted_s: float
    """0 for one that nobody predicted: it teaches, and counts in no error."""


def fixed_s(
    costs: StartCosts, model: ModelName, size_bytes: int, tier: Tier, node_id: NodeId
) -> float:
    """Return the seconds of a start beside moving bytes: this node's, any node's, or by size."""
    here = costs.fixed.get((model, tier, node_id), ())
    if len(here) >= ENOUGH:
        return median(here)
    anywhere = costs.fixed.get((model, tier, ANY_NODE), ())
    if anywhere:
        return median(anywhere)
    line = costs.by_size.get(tier)
    if line is not None:
        return line.at(size_bytes)
    others = [each.at(size_bytes) for each in costs.by_size.values()]
    return median(others) if others else UNKNOWN_FIXED_S


def learn_start(costs: StartCosts, start: Start) -> StartCosts:
    """Return the costs with one more recorded start."""
    timeline, tier = start.timeline, start.timeline.from_tier
    moving_s = timeline.remote_s + timeline.ssd_s
    if tier is not Tier.DRAM:
        # From DRAM no load is predicted: the copy to the device is part of what a start takes.
        moving_s += timeline.device_s
    # A canary is waited for once, at the first start after a registration.
    canary_wait_s = timeline.prepare_s if timeline.prepare_s >= CANARY_WAIT_S else 0.0
    spent_s = max(0.0, timeline.total_s - moving_s - timeline.waited_s - canary_wait_s)
    outcome = StartOutcome(
        start.model,
        start.worker_id,
        start.predicted_s,
        timeline.total_s,
        tier,
        start.size_bytes,
        spent_s,
    )
    fixed = dict(costs.fixed)
    for node_id in (start.node_id, ANY_NODE):
        key = (start.model, tier, node_id)
        # Put in anew: what was learned last stands last.
        fixed[key] = (*fixed.pop(key, ()), spent_s)[-NEWEST:]
    outcomes = (*costs.outcomes, outcome)[-KEPT_OUTCOMES:]
    learned = replace(
        costs,
        fixed=fixed,
        by_size={**costs.by_size, **_by_size(outcomes, tier)},
        outcomes=outcomes,
    )
    if canary_wait_s:
        learned = _learn_canary(learned, start, moving_s)
    return _learn_load(learned, start, moving_s) if tier is not Tier.DRAM else learned


def _learn_load(costs: StartCosts, start: Start, moving_s: float) -> StartCosts:
    key = (start.node_id, start.timeline.from_tier)
    newest = (*costs.loads.get(key, ()), (start.size_bytes, moving_s))[-NEWEST_LOADS:]
    lines = dict(costs.load_lines)
    if len(newest) >= MIN_LOADS and (line := line_through(newest)) is not None:
        lines[key] = line
    return replace(costs, loads={**costs.loads, key: newest}, load_lines=lines)


def _learn_canary(costs: StartCosts, start: Start, moving_s: float) -> StartCosts:
    timeline = start.timeline
    before_s = timeline.queued_s + timeline.waited_s + moving_s + timeline.attach_s
    newest = (start.size_bytes, before_s + timeline.prepare_s)
    canaries = (*costs.canaries, newest)[-NEWEST_CANARIES:]
    return replace(costs, canaries=canaries, canary_line=canary_line_through(canaries))


def canary_line_through(canaries: tuple[Point, ...]) -> Line:
    """Return the seconds until a canary by size."""
    return _line_or_median(canaries) if canaries else UNKNOWN_CANARY


def _by_size(outcomes: tuple[StartOutcome, ...], tier: Tier) -> dict[Tier, Line]:
    newest = [(o.size_bytes, o.fixed_s) for o in outcomes if o.from_tier is tier][-NEWEST_BY_SIZE:]
    return {tier: _line_or_median(newest)}


def _line_or_median(points: Sequence[Point]) -> Line:
    return line_through(points) or Line(median(seconds for _, seconds in points), 0.0)


def forget_absent(
    costs: StartCosts, models: Iterable[ModelName], nodes: Iterable[NodeId]
) -> StartCosts:
    """Return the costs without models that were removed and nodes that are gone for good."""
    known, there = frozenset(models), frozenset((*nodes, ANY_NODE))
    return replace(
        costs,
        fixed={k: v for k, v in costs.fixed.items() if k[0] in known and k[2] in there},
        loads={k: v for k, v in costs.loads.items() if k[0] in there},
        load_lines={k: v for k, v in costs.load_lines.items() if k[0] in there},
    )


def error_quantile(costs: StartCosts, share: float, tier: Tier | None = None) -> float | None:
    """Return a quantile of the relative error over the kept outcomes of a tier, or of all."""
    errors = sorted(
        o.error
        for o in costs.outcomes
        if o.measured_s > 0 and o.predicted_s > 0 and tier in (None, o.from_tier)
    )
    if not errors:
        return None
    at = share * (len(errors) - 1)
    low = int(at)
    high = min(low + 1, len(errors) - 1)
    return errors[low] + (at - low) * (errors[high] - errors[low])
