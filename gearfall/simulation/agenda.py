"""The simulated clock: what happens when, in the order of time and then of planning."""

from collections.abc import Callable
from heapq import heappop, heappush

EPOCH_S = 1_000_000.0
"""Simulated Unix time at the beginning: 0 has a meaning of its own in several records."""


class Agenda:
    """Owner of simulated time. It only goes forward, and only from event to event."""

    def __init__(self, now_s: float = EPOCH_S) -> None:
        self.now_s = now_s
        self.events = 0
        """That have happened."""
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    def at(self, when_s: float, event: Callable[[], None]) -> None:
        """Have `event` happen at `when_s`, after what was planned for that moment before."""
        assert when_s >= self.now_s, "nothing happens in the past"
        self._planned += 1
        heappush(self._due, (when_s, self._planned, event))

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        """Have `event` happen `delay_s` from now."""
        self.at(self.now_s + max(0.0, delay_s), event)

    def step(self) -> bool:
        """Let the next event happen; False when there is none."""
        if not self._due:
            return False
        when_s, _, event = heappop(self._due)
        assert when_s >= self.now_s, "time went back"
        self.now_s = when_s
        self.events += 1
        event()
        return True

    @property
    def next_s(self) -> float | None:
        """When the next event happens."""
        return self._due[0][0] if self._due else None
