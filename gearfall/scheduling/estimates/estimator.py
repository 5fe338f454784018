"""How long a start takes: waiting, moving the bytes, and what is left to do behind them.

ServerlessLLM (arXiv 2401.14351), section 6.1: startup time is the sum over the tiers to cross of
q + n / b. Here a store crosses remote, SSD and DRAM in one pass, so that one bandwidth stands for
all of them, and loads out of one tier of a node run one after the other. Attach, process, build and
the first token are learned from starts (`start_costs.py`). A new model's canary is computed beside
all that: what is left of it behind the load is waited for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gearfall.core.origin import bandwidth_out_of
from gearfall.core.records import ModelRecord, NodeRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.start_costs import StartCosts, fixed_s

_LEAST_LEFT = 0.05


@dataclass(frozen=True, slots=True)
class StartPrediction:
    """Expected seconds from the assignment to a ready replica, with the terms they are made of."""

    from_tier: Tier
    fixed_s: float
    size_bytes: int = 0
    """To move; 0 for a model that is in DRAM."""
    queued_s: float = 0.0
    """Until the loads asked for before, out of the same tier of the same node, are done."""
    queued_loads: int = 0
    bytes_per_s: float = 0.0
    """Out of that tier; 0 where nothing moves."""
    is_measured: bool = False
    """Whether the node has measured this bandwidth, or it is assumed."""
    overhead_s: float = 0.0
    """Of each load, whatever its size."""
    canary_s: float = 0.0
    """Behind the load, until the canary of a new model is recorded."""

    @property
    def load_s(self) -> float:
        """To move the bytes."""
        return self.overhead_s + self.size_bytes / self.bytes_per_s if self.bytes_per_s else 0.0

    @property
    def loaded_s(self) -> float:
        """Until the bytes are in memory."""
        return self.queued_s + self.load_s

    @property
    def total_s(self) -> float:
        """All terms together."""
        return self.after_s(0.0)

    def after_s(self, wait_s: float) -> float:
        """Return the seconds to a ready replica where the bytes come during a wait for room."""
        return max(wait_s, self.loaded_s) + self.canary_s + self.fixed_s

    def terms(self) -> str:
        """Return the sum in words and numbers."""
        rest = f"{self.canary_s:.2f} s for its canary, " * (self.canary_s > 0)
        rest += f"{self.fixed_s:.2f} s to start"
        if not self.bytes_per_s:
            return f"{self.total_s:.2f} s: in {self.from_tier.value}, {rest}"
        origin = "measured" if self.is_measured else "assumed"
        loads = f"{self.queued_loads} load" + "s" * (self.queued_loads > 1)
        queue = f"behind {loads} {self.queued_s:.2f} s, " * bool(self.queued_loads)
        return (
            f"{self.total_s:.2f} s: {queue}{_size(self.size_bytes)} from {self.from_tier.value} at "
            f"{_size(self.bytes_per_s)}/s ({origin}) {self.load_s:.2f} s, {rest}"
        )


def predict_start(
    model: ModelRecord,
    node: NodeRecord,
    from_tier: Tier,
    costs: StartCosts,
    *,
    queued: Sequence[tuple[int, float]] = (),
) -> StartPrediction:
    """Return the expected start of `model` on a worker of `node` whose bytes are in `from_tier`.

    `queued`: loads out of the same tier that come first, each with its bytes and the seconds since
    it was asked for.
    """
    spent_s = fixed_s(costs, model.name, model.size_bytes, from_tier, node.node_id)
    is_new = model.name in node.preparing
    recorded_s = costs.canary_line.at(model.size_bytes) if is_new else 0.0
    if from_tier is Tier.DRAM:
        return StartPrediction(from_tier, spent_s, canary_s=recorded_s)
    line = costs.load_lines.get((node.node_id, from_tier))
    if line is not None and line.s_per_byte > 0:
        bytes_per_s, is_measured, overhead_s = 1 / line.s_per_byte, True, line.fixed_s
    else:
        bandwidth, overhead_s = bandwidth_out_of(from_tier, node), 0.0
        bytes_per_s, is_measured = bandwidth.bytes_per_s, bandwidth.is_measured
    ahead = [(since_s, overhead_s + size / bytes_per_s) for size, since_s in queued]
    waits_s = queue_s(ahead)
    loaded_s = waits_s + overhead_s + model.size_bytes / bytes_per_s
    return StartPrediction(
        from_tier,
        spent_s,
        size_bytes=model.size_bytes,
        queued_s=waits_s,
        queued_loads=len(ahead),
        bytes_per_s=bytes_per_s,
        is_measured=is_measured,
        overhead_s=overhead_s,
        canary_s=max(0.0, recorded_s - loaded_s),
    )


def queue_s(loads: Iterable[tuple[float, float]]) -> float:
    """Return when the last of loads ends that run one after the other, in the order of asking.

    Each is given as the seconds since it was asked for and the seconds that it takes. One that
    should have ended has not: at least a twentieth of it is left.
    """
    ends_s = float("-inf")
    for since_s, takes_s in sorted(loads, key=lambda load: -load[0]):
        ends_s = max(max(ends_s, -max(0.0, since_s)) + takes_s, takes_s * _LEAST_LEFT)
    return max(0.0, ends_s)


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"
