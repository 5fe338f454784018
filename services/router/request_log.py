"""What happened to the last requests, for `gearfall why`: a bounded ring, in memory only."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from gearfall.core.errors import NotFound
from gearfall.core.ids import RequestId

MAX_REQUESTS = 2048
MAX_EVENTS = 128


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """One thing that happened to a request."""

    at_unix_s: float
    decision: str
    """admitted, queued, claimed, lost, escalated, finished or failed."""
    reason: str


class RequestLog:
    """The newest requests with their newest events."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max_requests = max_requests
        self._events: OrderedDict[str, list[RequestEvent]] = OrderedDict()

    def add(self, request_id: RequestId, at_unix_s: float, decision: str, reason: str) -> None:
        """Record an event; the oldest request goes when there are too many."""
        events = self._events.setdefault(request_id, [])
        if len(events) == MAX_EVENTS:
            del events[1]
        events.append(RequestEvent(at_unix_s, decision, reason))
        while len(self._events) > self._max_requests:
            self._events.popitem(last=False)

    def events(self, request_id: str) -> Sequence[RequestEvent]:
        """Return a request's events, newest first; NotFound when none is remembered."""
        if request_id not in self._events:
            raise NotFound(f"request {request_id} is not among the last {self._max_requests}")
        return tuple(reversed(self._events[request_id]))
