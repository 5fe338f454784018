"""Records that are on their way to cluster state: they count before it has them.

A change that is older than such a record says nothing of it. One that comes while nobody knows yet
how old it is waits until the record's revision is known.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gearfall.infra.state.change_feed import Change
from gearfall.scheduling.actions import Action, Assign, Unwish, Wish
from gearfall.scheduling.fleet.fleet import Fleet

INDEPENDENT = Assign | Wish | Unwish
"""Steps that nothing which stands depends on, so that the next decision need not wait for them."""

Place = tuple[str, Any]
"""Kind and id of a record."""


@dataclass(slots=True)
class _Write:
    record: Any
    """None for one that is deleted."""
    revision: int | None = None
    """Of cluster state with it; None while it is not written."""
    waiting: Change | None = None
    """The last change of the same record, which may be older or newer."""


class ExpectedRecords:
    """Owner of what a fleet holds ahead of the changes that are taken in."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._writes: dict[Place, _Write] = {}

    def holds_any(self, steps: Iterable[Action]) -> bool:
        """Whether one of the records that steps write is on its way already."""
        return any(place in self._writes for place, _ in map(_write_of, steps))

    def add(self, steps: Iterable[Action]) -> list[Place]:
        """Have independent steps count that begin to be written; return their records' places."""
        added = dict(map(_write_of, steps))
        for place, write in added.items():
            self._put(place, write.record)
        self._writes |= added
        return list(added)

    def note_written(self, places: Iterable[Place], revision: int) -> None:
        """Cluster state has them, as of a revision."""
        for place in places:
            if place in self._writes:
                self._writes[place].revision = revision

    def holds_back(self, change: Change, revision: int) -> bool:
        """Whether a change, taken in as of a revision, must not be put to the fleet now."""
        write = self._writes.get((change.kind, change.record_id))
        if write is None:
            return False
        if write.revision is not None and write.revision <= revision:
            write.waiting = None  # this change came after it
            return False
        write.waiting = change
        return True

    def restart(self, revision: int) -> None:
        """The fleet was made anew from the state as of a revision, which may be an older one."""
        for write in self._writes.values():
            write.waiting = None
        self.settle(revision)
        for place, write in self._writes.items():
            self._put(place, write.record)

    def settle(self, revision: int) -> None:
        """All changes up to a revision were taken in: what it holds is expected no more."""
        seen = [
            place
            for place, write in self._writes.items()
            if write.revision is not None and write.revision <= revision
        ]
        for place in seen:
            waiting = self._writes.pop(place).waiting
            if waiting is not None:
                self._put(place, waiting.record)

    def clear(self) -> None:
        """Expect nothing; the fleet is to be made anew."""
        self._writes.clear()

    def _put(self, place: Place, record: Any) -> None:
        kind, record_id = place
        if record is None:
            self._fleet.remove(kind, record_id)
        else:
            self._fleet.put(kind, record)


def _write_of(step: Action) -> tuple[Place, _Write]:
    match step:
        case Assign(assignment):
            key = (assignment.worker_id, assignment.model)
            return ("assignments", key), _Write(assignment)
        case Wish(prefetch):
            return ("prefetch", (prefetch.node_id, prefetch.model)), _Write(prefetch)
        case Unwish(wished):
            return ("prefetch", wished), _Write(None)
    raise AssertionError(f"{step} is not independent")
