"""How fast loads came out of each tier lately. Pure."""

from collections import deque
from collections.abc import Iterable
from statistics import median

from gearfall.core.tiers import Tier

_RECENT_LOADS = 8
_MIN_MEASURED_BYTES = 2**20
"""The time of a smaller load is latency and says nothing about bandwidth."""


class RecentSpeeds:
    """Owner of the newest loads' speeds, by the tier that was read."""

    def __init__(self, tiers: Iterable[Tier]) -> None:
        self._recent: dict[Tier, deque[float]] = {
            tier: deque(maxlen=_RECENT_LOADS) for tier in tiers
        }

    def note(self, tier: Tier, size_bytes: int, seconds: float) -> None:
        """Take a load in."""
        if size_bytes >= _MIN_MEASURED_BYTES:
            self._recent[tier].append(size_bytes / max(seconds, 1e-9))

    def of(self, tier: Tier) -> float:
        """Median bytes per second; 0 before the first."""
        recent = self._recent[tier]
        return median(recent) if recent else 0.0
