"""The tiers that bytes are in, and what leaves one when room is needed.

Those models leave that cost least to bring back, weighed by expected use. The cost of losing one
from a tier is the time to bring it back (its size over the bandwidth of the tier that still holds
it) times how often it will be wanted, for which stands how often it was wanted lately: a count of
uses that halves every `HALF_LIFE_S`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from gearfall.core.ids import ModelName

HALF_LIFE_S = 600.0
UNKNOWN_BYTES_PER_S = 100e6
"""Bandwidth of a tier that was never measured: that of a slow disk or a 1 Gbit/s link."""


class Tier(Enum):
    """Where a checkpoint's bytes are, fastest last."""

    __hash__ = object.__hash__  # members are one object each; Enum's own is Python and hashes names

    REMOTE = "remote"
    SSD = "ssd"
    DRAM = "dram"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class UseCount:
    """Uses so far, each worth half as much after every half-life."""

    weight: float = 0.0
    """As it was at `at_s`."""
    at_s: float = 0.0

    def at(self, now_s: float, half_life_s: float = HALF_LIFE_S) -> float:
        """Return the weight now; a clock that went back counts as one that stood."""
        return float(self.weight * 0.5 ** (max(0.0, now_s - self.at_s) / half_life_s))

    def used(self, now_s: float, half_life_s: float = HALF_LIFE_S) -> "UseCount":
        """Count one more use."""
        return UseCount(self.at(now_s, half_life_s) + 1.0, max(now_s, self.at_s))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may leave a tier."""

    model: ModelName
    size_bytes: int
    bytes_per_s: float
    """Bandwidth of the tier it would have to come back from; 0 while unknown."""
    use: float
    """Expected use: `UseCount.at` now."""

    @property
    def bring_back_s(self) -> float:
        """Seconds to bring it back once."""
        return self.size_bytes / (self.bytes_per_s or UNKNOWN_BYTES_PER_S)

    @property
    def cost_s(self) -> float:
        """Seconds that losing it is expected to cost."""
        return self.bring_back_s * self.use


def choose_victims(candidates: Sequence[Candidate], missing_bytes: int) -> Sequence[ModelName]:
    """Return the models to evict for `missing_bytes`, cheapest first; none when all are too few.

    Greedy by cost for each byte freed, ties in the order given; then whatever turned out to be more
    than needed stays, dearest first. No single victim can be spared.
    """
    if missing_bytes <= 0 or sum(found.size_bytes for found in candidates) < missing_bytes:
        return ()
    chosen: list[Candidate] = []
    spare_bytes = -missing_bytes
    for candidate in sorted(candidates, key=_cost_per_byte):
        if spare_bytes >= 0:
            break
        chosen.append(candidate)
        spare_bytes += candidate.size_bytes
    for candidate in sorted(chosen, key=lambda found: found.cost_s, reverse=True):
        if candidate.size_bytes <= spare_bytes:
            chosen.remove(candidate)
            spare_bytes -= candidate.size_bytes
    return tuple(candidate.model for candidate in chosen)


def _cost_per_byte(candidate: Candidate) -> float:
    return candidate.use / (candidate.bytes_per_s or UNKNOWN_BYTES_PER_S)
