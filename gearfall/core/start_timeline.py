"""Where the time of a replica's start went, phase by phase."""

from dataclasses import dataclass

from gearfall.core.tiers import Tier

PHASES = (
    *("queued", "waited", "remote", "ssd", "device", "attach"),
    *("prepare", "process", "build", "first token"),
)
"""Of a start, in order, in words."""
MIN_PHASE_S = 1e-6


@dataclass(frozen=True, slots=True)
class StartTimeline:
    """Seconds spent in each phase of a replica's start, in order.

    An engine starts while its model is still being loaded: what ran beside the load is not counted
    again, so that the phases add up to the whole.
    """

    queued_s: float = 0.0
    """From the decision until the node's store has the load in hand."""
    remote_s: float = 0.0
    ssd_s: float = 0.0
    """SSD to DRAM with checksums; 0 when the model was resident."""
    device_s: float = 0.0
    attach_s: float = 0.0
    """Lease and mapping of the pool."""
    process_s: float = 0.0
    """Fork of the engine process from the warm parent."""
    build_s: float = 0.0
    """Model on the meta device, tensors assigned as views."""
    first_token_s: float = 0.0
    """The canary's pass, which touches every weight."""
    total_s: float = 0.0
    from_tier: Tier = Tier.SSD
    """Where the bytes were when the start began."""
    prepare_s: float = 0.0
    """From the lease until config and canary, fetched beside the load, were there as well. The
    first start after a registration waits here until the canary is recorded."""
    waited_s: float = 0.0
    """Behind other loads of the node's store."""

    def phases(self) -> tuple[tuple[str, float], ...]:
        """Every phase that took time, in order; `rest` is what the others leave of the total."""
        spent = [(name, getattr(self, f"{name.replace(' ', '_')}_s")) for name in PHASES]
        rest_s = self.total_s - sum(seconds for _, seconds in spent)
        return tuple((name, s) for name, s in (*spent, ("rest", rest_s)) if s > MIN_PHASE_S)
