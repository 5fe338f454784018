"""What has to be looked at again at which time, though nothing changes."""

import heapq
from typing import Generic, TypeVar

Subject = TypeVar("Subject", bound=str | tuple[str, str])


class DueTimes(Generic[Subject]):
    """Owner of one time per subject; the earliest comes first."""

    def __init__(self) -> None:
        self._at: dict[Subject, float] = {}
        self._heap: list[tuple[float, Subject]] = []

    def put(self, subject: Subject, at_unix_s: float | None) -> None:
        """Set, move or (None) take away a subject's time."""
        if self._at.get(subject) == at_unix_s:
            return
        if at_unix_s is None:
            del self._at[subject]
            return
        self._at[subject] = at_unix_s
        heapq.heappush(self._heap, (at_unix_s, subject))
        if len(self._heap) > 64 + 4 * len(self._at):
            self._heap = [(at, each) for each, at in self._at.items()]
            heapq.heapify(self._heap)

    def get(self, subject: Subject) -> float | None:
        """Return a subject's time."""
        return self._at.get(subject)

    def take(self, now_unix_s: float) -> set[Subject]:
        """Return the subjects whose time has come, and forget their times."""
        taken = set()
        while (first := self._first()) is not None and first[0] <= now_unix_s:
            taken.add(first[1])
            del self._at[first[1]]
        return taken

    def earliest(self) -> float | None:
        """Return the earliest time of any subject."""
        first = self._first()
        return first[0] if first else None

    def as_dict(self) -> dict[Subject, float]:
        """Return every subject's time, for comparison."""
        return dict(self._at)

    def _first(self) -> tuple[float, Subject] | None:
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None
