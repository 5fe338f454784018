"""How long a start takes: bytes over bandwidth plus a fixed cost learned from recorded starts.

ServerlessLLM (arXiv 2401.14351), section 5: startup time is the sum over the tiers to cross of
queue and size over bandwidth; process, build and first token are added as one learned constant.
Here a store crosses remote, SSD and DRAM in one pass, so that one bandwidth stands for all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.origin import bandwidth_out_of
from gearfall.core.records import ModelRecord, NodeRecord, StartTimeline, Tier

UNKNOWN_FIXED_S = 1.0
"""Assumed until a start was recorded."""
NEWEST_WEIGHT = 0.3
"""Weight of the newest start in the moving average."""
KEPT_OUTCOMES = 256


@dataclass(frozen=True, slots=True)
class StartPrediction:
    """Expected seconds from the assignment to a ready replica, with the terms they are made of."""

    from_tier: Tier
    fixed_s: float
    size_bytes: int = 0
    """To move; 0 for a model that is in DRAM."""
    queued_bytes: int = 0
    """Of loads that were asked for before, out of the same tier of the same node."""
    bytes_per_s: float = 0.0
    """Out of that tier; 0 where nothing moves."""
    is_measured: bool = False
    """Whether the node has measured this bandwidth, or it is assumed."""

    @property
    def queued_s(self) -> float:
        """Until the loads before this one are done, at most."""
        return self.queued_bytes / self.bytes_per_s if self.bytes_per_s else 0.0

    @property
    def load_s(self) -> float:
        """To move the bytes."""
        return self.size_bytes / self.bytes_per_s if self.bytes_per_s else 0.0

    @property
    def total_s(self) -> float:
        """All terms together."""
        return self.queued_s + self.load_s + self.fixed_s

    def terms(self) -> str:
        """Return the sum in words and numbers."""
        if not self.bytes_per_s:
            return f"{self.total_s:.2f} s: in {self.from_tier.value}, {self.fixed_s:.2f} s to start"
        origin = "measured" if self.is_measured else "assumed"
        queue = f"behind {_size(self.queued_bytes)} {self.queued_s:.2f} s, " * bool(
            self.queued_bytes
        )
        return (
            f"{self.total_s:.2f} s: {queue}{_size(self.size_bytes)} from {self.from_tier.value} at "
            f"{_size(self.bytes_per_s)}/s ({origin}) {self.load_s:.2f} s, "
            f"{self.fixed_s:.2f} s to start"
        )


@dataclass(frozen=True, slots=True)
class StartOutcome:
    """One start as it was predicted and as it went."""

    model: ModelName
    worker_id: WorkerId
    predicted_s: float
    measured_s: float


@dataclass(frozen=True, slots=True)
class StartCosts:
    """What recorded starts have taught."""

    fixed_s_by_model: Mapping[ModelName, float] = field(default_factory=dict)
    fixed_s: float | None = None
    """Moving average over all models; for one that never started."""
    outcomes: tuple[StartOutcome, ...] = ()
    """Oldest first, at most KEPT_OUTCOMES."""


def predict_start(
    model: ModelRecord,
    node: NodeRecord,
    from_tier: Tier,
    costs: StartCosts,
    *,
    queued_bytes: int = 0,
) -> StartPrediction:
    """Return the expected start of `model` on a worker of `node` whose bytes are in `from_tier`.

    `queued_bytes`: of loads out of the same tier that come first.
    """
    any_model = UNKNOWN_FIXED_S if costs.fixed_s is None else costs.fixed_s
    fixed_s = costs.fixed_s_by_model.get(model.name, any_model)
    if from_tier is Tier.DRAM:
        return StartPrediction(from_tier, fixed_s)
    bandwidth = bandwidth_out_of(from_tier, node)
    return StartPrediction(
        from_tier,
        fixed_s,
        size_bytes=model.size_bytes,
        queued_bytes=queued_bytes,
        bytes_per_s=bandwidth.bytes_per_s,
        is_measured=bandwidth.is_measured,
    )


def learn_start(
    costs: StartCosts,
    model: ModelName,
    worker_id: WorkerId,
    timeline: StartTimeline,
    predicted_s: float,
) -> StartCosts:
    """Return the costs with one more recorded start."""
    moving_s = timeline.remote_s + timeline.ssd_s + timeline.device_s
    # A canary is waited for once, at the first start after a registration.
    fixed_s = max(0.0, timeline.total_s - moving_s - timeline.prepare_s)
    outcome = StartOutcome(model, worker_id, predicted_s, timeline.total_s)
    return StartCosts(
        fixed_s_by_model={
            **costs.fixed_s_by_model,
            model: _moved(costs.fixed_s_by_model.get(model), fixed_s),
        },
        fixed_s=_moved(costs.fixed_s, fixed_s),
        outcomes=(*costs.outcomes, outcome)[-KEPT_OUTCOMES:],
    )


def _moved(average: float | None, newest: float) -> float:
    return newest if average is None else average + NEWEST_WEIGHT * (newest - average)


def median_error(costs: StartCosts) -> float | None:
    """Return the median of |predicted - measured| / measured, None before any start."""
    errors = [
        abs(o.predicted_s - o.measured_s) / o.measured_s for o in costs.outcomes if o.measured_s > 0
    ]
    return median(errors) if errors else None


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"
