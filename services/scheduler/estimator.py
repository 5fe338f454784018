"""How long a start takes: bytes over bandwidth plus a fixed cost learned from recorded starts.

ServerlessLLM (arXiv 2401.14351), section 5: startup time is the sum over the tiers to cross of
queue and size over bandwidth; process, build and first token are added as one learned constant.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.records import ModelRecord, NodeRecord, StartTimeline, Tier

UNKNOWN_SSD_BYTES_PER_S = 1e9
"""Assumed until a node has measured its own."""
UNKNOWN_FIXED_S = 1.0
"""Assumed until a start was recorded."""
NEWEST_WEIGHT = 0.3
"""Weight of the newest start in the moving average."""
KEPT_OUTCOMES = 256


@dataclass(frozen=True, slots=True)
class StartPrediction:
    """Expected seconds from the assignment to a ready replica."""

    load_s: float
    fixed_s: float
    from_tier: Tier

    @property
    def total_s(self) -> float:
        """Load and fixed cost together."""
        return self.load_s + self.fixed_s


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


def predict_start(model: ModelRecord, node: NodeRecord, costs: StartCosts) -> StartPrediction:
    """Return the expected start of `model` on a worker of `node`."""
    any_model = UNKNOWN_FIXED_S if costs.fixed_s is None else costs.fixed_s
    fixed_s = costs.fixed_s_by_model.get(model.name, any_model)
    if model.name in node.resident:
        return StartPrediction(0.0, fixed_s, Tier.DRAM)
    bytes_per_s = node.ssd_bytes_per_s if node.ssd_bytes_per_s > 0 else UNKNOWN_SSD_BYTES_PER_S
    return StartPrediction(model.size_bytes / bytes_per_s, fixed_s, Tier.SSD)


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
