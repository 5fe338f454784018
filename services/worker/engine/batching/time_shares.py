"""Whose the time was of an engine that batches by itself: at every moment all its requests' alike.

An even share is what there is to say without seeing the steps. `_each_s` is what one request would
have been owed that had run from the beginning; a job is owed how much of it passed while it ran.
"""

from collections.abc import Hashable


class TimeShares:
    """Owner of the books; times are on any one clock, in seconds, and never go back."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        """With at least one request running."""
        self.dropped_s = 0.0
        self._each_s = 0.0
        self._at_s = 0.0
        self._since: dict[Hashable, float] = {}
        """Of each running job: `_each_s` when it began, or was last told."""
        self._owed: dict[Hashable, float] = {}
        """Of jobs that do not run, from before."""

    def begin(self, key: Hashable, now_s: float) -> None:
        """A job's request runs from now on."""
        self._pass(now_s)
        self._since.setdefault(key, self._each_s)

    def pause(self, key: Hashable, now_s: float) -> None:
        """It runs no more."""
        if key in self._since:
            self._owed[key] = self.take(key, now_s)
            del self._since[key]

    def take(self, key: Hashable, now_s: float) -> float:
        """Return what the job is owed, to be told with its run."""
        self._pass(now_s)
        owed_s = self._owed.pop(key, 0.0)
        if key in self._since:
            owed_s += self._each_s - self._since[key]
            self._since[key] = self._each_s
        return owed_s

    def drop(self, key: Hashable, now_s: float) -> None:
        """The job is gone, and what it is owed with it."""
        self.dropped_s += self.take(key, now_s)
        self._since.pop(key, None)

    def _pass(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        self._at_s = now_s
        if self._since:
            self.busy_s += passed_s
            self._each_s += passed_s / len(self._since)
