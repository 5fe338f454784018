"""What the simple placement policies prefer: an order of workers, and who may make room."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b

from gearfall.core.ids import WorkerId
from gearfall.core.records import ModelRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.estimator import StartPrediction
from gearfall.scheduling.snapshot import WorkerRoom

_NEAREST_FIRST = {Tier.DEVICE: 0, Tier.DRAM: 1, Tier.SSD: 2, Tier.REMOTE: 3}


class RoomRule(Enum):
    """What happens when the preferred workers are full."""

    ANY = "any"
    """The next worker with room takes it; idle replicas leave only when there is none."""
    NEAREST_ONLY = "nearest only"
    """It waits for those where the bytes are nearest."""
    PREEMPT = "preempt"
    """Busy replicas of the preferred worker are stopped when that is sooner than another place."""


@dataclass(frozen=True, slots=True)
class Option:
    """A worker that could host the model if it had room."""

    room: WorkerRoom
    memory_bytes: int
    prediction: StartPrediction
    jobs_on_node: int

    @property
    def worker_id(self) -> WorkerId:
        """Of the worker."""
        return self.room.worker.worker_id

    @property
    def nearness(self) -> int:
        """Smaller is nearer."""
        return _NEAREST_FIRST[self.prediction.from_tier]


Rank = tuple[float, ...]
Order = Callable[[ModelRecord, Option, int], Rank]
"""Of a model, a worker and a draw; smallest first."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One simple policy."""

    name: str
    order: Order
    room: RoomRule


def _by_draw(_: ModelRecord, __: Option, draw: int) -> Rank:
    return (float(draw),)


def _by_load(_: ModelRecord, option: Option, draw: int) -> Rank:
    return (float(len(option.room.hosting)), float(option.jobs_on_node), float(draw))


def _by_nearness(_: ModelRecord, option: Option, draw: int) -> Rank:
    return (float(option.nearness), float(draw))


def _by_start(_: ModelRecord, option: Option, draw: int) -> Rank:
    return (option.prediction.total_s, float(draw))


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("random", _by_draw, RoomRule.ANY),
        Rule("least-loaded", _by_load, RoomRule.ANY),
        Rule("locality", _by_nearness, RoomRule.NEAREST_ONLY),
        Rule("preempt", _by_start, RoomRule.PREEMPT),
    )
}


def draw_for(seed: int, model: str, worker_id: str, at_unix_s: float) -> int:
    """Return a number that is as good as random and the same whenever all of these are."""
    text = f"{seed} {model} {worker_id} {at_unix_s!r}"
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest())
