"""What happened to the last requests, for `gearfall why`: a bounded ring, in memory only."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gearfall.core.errors import NotFound
from gearfall.core.ids import ModelName, RequestId
from gearfall.core.records import DecisionRecord

MAX_REQUESTS = 2048
MAX_EVENTS = 128


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """One thing that happened to a request."""

    at_unix_s: float
    decision: str
    """admitted, skipped, queued, claimed, moved, lost, answered, escalated, replaced, degraded,
    finished or failed."""
    reason: str
    model: str = ""
    """That a stage runs on; empty where it is about the whole request."""
    predicted_s: float = 0.0
    """Of a wait for a start; 0 where none was expected."""
    measured_s: float = 0.0
    """What it took; 0 where nothing was timed."""


class RequestLog:
    """The newest requests with their newest events."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max_requests = max_requests
        self._events: OrderedDict[str, list[RequestEvent]] = OrderedDict()

    def add(self, request_id: RequestId, event: RequestEvent) -> None:
        """Record an event; the oldest request goes when there are too many."""
        events = self._events.setdefault(request_id, [])
        if len(events) == MAX_EVENTS:
            del events[1]
        events.append(event)
        while len(self._events) > self._max_requests:
            self._events.popitem(last=False)

    def events(self, request_id: str) -> Sequence[RequestEvent]:
        """Return a request's events, newest first; NotFound when none is remembered."""
        if request_id not in self._events:
            raise NotFound(f"request {request_id} is not among the last {self._max_requests}")
        return tuple(reversed(self._events[request_id]))


def decisions_within(
    events: Sequence[RequestEvent], decisions: Mapping[ModelName, DecisionRecord]
) -> tuple[DecisionRecord, ...]:
    """Return what was decided about the request's models while it was on its way.

    `events`: newest first. Only the last decision about each model is known.
    """
    if not events:
        return ()
    models = {event.model for event in events if event.model}
    first, last = events[-1].at_unix_s, events[0].at_unix_s
    return tuple(
        decision
        for name, decision in sorted(decisions.items())
        if name in models and first <= decision.at_unix_s <= last
    )
