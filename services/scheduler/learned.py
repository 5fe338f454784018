"""What a leader leaves for the next one, now and then, in cluster state."""

import logging
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.core.records import LearnedRecord
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.scheduling.estimates.start_costs_json import costs_from_json
from gearfall.scheduling.prefetching.arrivals_json import arrivals_from_json
from gearfall.scheduling.prefetching.forecast import ArrivalHistory
from services.scheduler.start_learning import StartLearning

STARTS = "starts"
ARRIVALS = "arrivals"
WRITE_EVERY_S = 10.0
"""At most: a start that was learned since is learned again by whoever comes next."""
ARRIVALS_EVERY = 6
"""Arrivals change all the time: they are written so many times more seldom."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Keeper(Generic[T]):
    """Says when one subject has to be written again, and what."""

    def __init__(
        self,
        subject: str,
        read: Callable[[], T],
        encode: Callable[[T], str],
        *,
        clock: Callable[[], float],
        write_every_s: float,
        version: Callable[[], object] | None = None,
        empty: object = None,
    ) -> None:
        """`version`: something that differs whenever more was learned (default: what is read);
        `empty`: what it is while nothing was."""
        self._subject = subject
        self._read = read
        self._encode = encode
        self._clock = clock
        self._write_every_s = write_every_s
        self._version = version or read
        self._kept = self._taken = empty
        self._kept_unix_s = float("-inf")
        self._is_sent = False

    def note_sent(self) -> None:
        """The record that was taken is on its way: nothing is due until `note_written`."""
        self._is_sent = True

    def note_lost(self) -> None:
        """Whatever is on its way may not arrive: it is due again."""
        self._is_sent = False

    def note_known(self) -> None:
        """What there is now stands in cluster state."""
        self._kept, self._kept_unix_s = self._version(), self._clock()

    def due_unix_s(self) -> float | None:
        """When there will be something to write; None while nothing was learned."""
        if self._is_sent or self._version() == self._kept:
            return None
        return self._kept_unix_s + self._write_every_s

    def take(self) -> LearnedRecord | None:
        """Return the record to write, if one is due; `note_written` follows when it was."""
        due_unix_s, now_unix_s = self.due_unix_s(), self._clock()
        if due_unix_s is None or due_unix_s > now_unix_s:
            return None
        self._taken = self._version()
        return LearnedRecord(self._subject, now_unix_s, self._encode(self._read()))

    def note_written(self) -> None:
        """The record that was taken last stands in cluster state."""
        self._is_sent = False
        self._kept, self._kept_unix_s = self._taken, self._clock()


def restore_starts(view: ClusterView, starts: StartLearning) -> bool:
    """Begin from the costs that the last leader left, if it left any."""
    record = view.learned.get(STARTS)
    costs = _decoded(record, costs_from_json)
    if record is None or costs is None:
        return False
    starts.restore(costs)
    for key, replica in view.replicas.items():
        assignment = view.assignments.get(key)
        if assignment is not None:
            ready_unix_s = assignment.assigned_unix_s + replica.timeline.total_s
            if ready_unix_s < record.at_unix_s:
                starts.skip(replica, assignment)
    return True


def restored_arrivals(view: ClusterView) -> Mapping[ModelName, ArrivalHistory]:
    """Return the arrivals that the last leader left; none where it left none."""
    return _decoded(view.learned.get(ARRIVALS), arrivals_from_json) or {}


def _decoded(record: LearnedRecord | None, decode: Callable[[str], T]) -> T | None:
    """Return what a record holds; what is no such record is logged and ignored."""
    if record is None:
        return None
    try:
        return decode(record.content)
    except InvalidRequest as error:
        message, extra = "what was learned can't be read", {"subject": record.subject}
        _log.warning(message, extra={**extra, "error": error.message})
        return None
