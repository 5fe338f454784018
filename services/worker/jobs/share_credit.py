"""How far a worker is behind its share of a model's jobs, from two counts of its own.

Every job that comes to the queue earns it `share` of a job; every job that it takes costs it one.
All workers' credits add up to what waits, so that one which is behind finds the others ahead, and
no worker has to know of another. Stride scheduling (Waldspurger, 1995) with the arrivals as clock.
"""

import math
from dataclasses import dataclass

MOST_CREDIT = 32.0
"""Jobs that are remembered either way: what came in an outage is not made up for ever."""
LEAD = 1.0
"""Jobs that it may be ahead before it leaves any to others: whoever has waited longest on the queue
is served first as it is, which alone keeps shares that are nearly equal."""
_ROUNDING = 1e-9


@dataclass(slots=True)
class ShareCredit:
    """Owner of one worker's credit for one model."""

    credit: float = 0.0
    """Jobs that it is behind; negative when it is ahead."""
    _appended: int | None = None

    @property
    def is_begun(self) -> bool:
        """Whether arrivals were ever counted."""
        return self._appended is not None

    @property
    def is_ahead(self) -> bool:
        """Whether others are to have the next job first."""
        return self.credit < -LEAD - _ROUNDING

    @property
    def most_jobs(self) -> int:
        """Jobs that it may take now without getting ahead by more than one."""
        return max(1, math.ceil(self.credit - _ROUNDING))

    def note_arrivals(self, appended: int, share: float) -> None:
        """Take in how many jobs ever came; a count that runs back began anew."""
        before = appended if self._appended is None else self._appended
        self._appended = appended
        self._add(share * max(0, appended - before))

    def note_taken(self, jobs: int) -> None:
        """It took jobs."""
        self._add(-float(jobs))

    def forget(self) -> None:
        """Begin anew: shares are not asked for."""
        self.credit, self._appended = 0.0, None

    def _add(self, jobs: float) -> None:
        self.credit = max(-MOST_CREDIT, min(MOST_CREDIT, self.credit + jobs))
