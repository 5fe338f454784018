"""What a leader leaves for the next one: start costs, now and then, in cluster state."""

import logging
from collections.abc import Callable

from gearfall.core.errors import InvalidRequest
from gearfall.core.records import LearnedRecord
from gearfall.infra.cluster_view import ClusterView
from gearfall.scheduling.start_costs import StartCosts
from gearfall.scheduling.start_costs_json import costs_from_json, costs_to_json
from services.scheduler.start_learning import StartLearning

STARTS = "starts"
WRITE_EVERY_S = 10.0
"""At most: a start that was learned since is learned again by whoever comes next."""

_log = logging.getLogger(__name__)


class Learned:
    """One term's share in what all leaders have learned."""

    def __init__(
        self,
        starts: StartLearning,
        clock: Callable[[], float],
        *,
        write_every_s: float,
    ) -> None:
        self._starts = starts
        self._clock = clock
        self._write_every_s = write_every_s
        self._kept = self._taken = starts.costs
        self._kept_unix_s = float("-inf")

    def restore(self, view: ClusterView) -> None:
        """Begin from what the last leader left; what is no such record is logged and ignored."""
        record = view.learned.get(STARTS)
        if record is None:
            # State was made anew under a scheduler that had learned: it writes again.
            self._kept = StartCosts()
            return
        try:
            costs = costs_from_json(record.content)
        except InvalidRequest as error:
            _log.warning("what was learned can't be read", extra={"error": error.message})
            return
        self._starts.restore(costs)
        for key, replica in view.replicas.items():
            assignment = view.assignments.get(key)
            if assignment is not None:
                ready_unix_s = assignment.assigned_unix_s + replica.timeline.total_s
                if ready_unix_s < record.at_unix_s:
                    self._starts.skip(replica, assignment)
        self._kept, self._kept_unix_s = costs, self._clock()

    def due_unix_s(self) -> float | None:
        """When there will be something to write; None while nothing was learned."""
        if self._starts.costs == self._kept:
            return None
        return self._kept_unix_s + self._write_every_s

    def take(self) -> LearnedRecord | None:
        """Return the record to write, if one is due; `note_written` follows when it was."""
        due_unix_s, now_unix_s = self.due_unix_s(), self._clock()
        if due_unix_s is None or due_unix_s > now_unix_s:
            return None
        self._taken = self._starts.costs
        return LearnedRecord(STARTS, now_unix_s, costs_to_json(self._taken))

    def note_written(self) -> None:
        """The record that was taken last stands in cluster state."""
        self._kept, self._kept_unix_s = self._taken, self._clock()
