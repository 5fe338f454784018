"""What comes to simulated cascades, and what becomes of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from gearfall.core.certainty.escalation import Degraded
from gearfall.core.ids import ModelName


@dataclass(frozen=True, slots=True)
class Arrival:
    """A query that comes."""

    at_s: float
    query: int


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Where the time of one stage went; they add up to all of it."""

    model: ModelName
    queued_s: float
    """Until a replica took its job."""
    way_s: float
    """To the engine."""
    engine_s: float
    """From there until its end was heard of: the wait for a step, and steps."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of one request."""

    at_s: float
    first_token_s: float
    """Until the first token of the answer that was released could be shown: a stage that may be
    overruled shows nothing before it has ended. With a plan for beginnings that is later than
    clients see it: `early` shows an accepted answer from its held tokens on."""
    total_s: float
    quality: float
    cost: float
    stages: int
    """That ran."""
    gear: int
    times: tuple[StageTimes, ...]
    """One a stage."""
    degraded: Degraded | None = None
    """Why it is not the answer of a stage above, to which it would have gone up."""


@dataclass(frozen=True, slots=True)
class CascadeRun:
    """Everything that happened."""

    answered: tuple[Answered, ...]
    shifts: tuple[tuple[float, int], ...]
    """(seconds, gear) of each shift, the first gear at 0 included."""
    busy_share: Mapping[str, float]
    """By model and node: share of the slots' time that was used."""
    device_s: float = 0.0
    """Computed by all replicas together."""
