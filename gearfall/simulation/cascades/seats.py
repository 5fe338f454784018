"""Replicas that stay, and which of them takes the next job of a model: by shares, as workers do.

Every job that comes earns each replica its share of one, every job that it takes costs it one; who
is furthest behind takes the next. Who has no room leaves it to the others.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gearfall.core.ids import ModelName
from gearfall.simulation.cascades.step_engine import StepEngine, StepSpeed

MOST_CREDIT = 32.0
"""Jobs by which a worker's share is remembered, as in its claims."""


@dataclass(frozen=True, slots=True)
class FixedReplica:
    """A replica that is there all the time."""

    model: ModelName
    node: str
    speed: StepSpeed
    slots: int
    worker: str = ""
    """Replicas that name the same one share its core; empty: a core of its own."""


@dataclass(slots=True)
class Seat:
    """A replica and the jobs that it runs."""

    replica: FixedReplica
    engine: StepEngine
    running: int = 0
    busy_s: float = 0.0
    changed_s: float = 0.0
    credit: float = 0.0
    """Jobs that it is behind its share of those that came."""

    @property
    def has_room(self) -> bool:
        """Whether it may take a job."""
        return self.running < self.replica.slots

    def take(self, change: int, now_s: float) -> None:
        """Begin or end so many jobs."""
        self.busy_s += self.running * (now_s - self.changed_s)
        self.changed_s = now_s
        self.running += change
        assert 0 <= self.running <= self.replica.slots, "no slot is given twice"


def give_credit(seats: Sequence[Seat], by_node: Mapping[str, float]) -> None:
    """A job came: each replica is due its share of it, as its node's says or all alike."""
    on_node = Counter(each.replica.node for each in seats)
    live = sum(by_node.get(node, 0.0) for node in on_node)
    for each in seats:
        node = each.replica.node
        share = by_node.get(node, 0.0) / live / on_node[node] if live else 1.0 / len(seats)
        each.credit = min(each.credit + share, MOST_CREDIT)


def next_seat(seats: Sequence[Seat], *, may_begin: bool) -> Seat | None:
    """Return who takes the next job, None for nobody. `may_begin`: whether idle ones may."""
    free = [each for each in seats if each.has_room and (may_begin or each.running)]
    if not free:
        return None
    seat = max(free, key=lambda each: (each.credit, -each.running / each.replica.slots))
    seat.credit = max(seat.credit - 1.0, -MOST_CREDIT)
    return seat
