"""Whose time the engine's steps were: each step's seconds, divided by the tokens that it computed.

    step's seconds -> owed to each job that ran in it -> told with the job's next run
                                                      -> dropped, of a job that got no more runs

Every busy second is in exactly one of the three places; what a step took behind its tokens counts
for the next. Tokens of a prompt cost less than tokens of an answer where memory's speed is what
limits; the division says who was in the step, not why it took its time.
"""

import math
from collections.abc import Callable, Sequence

from services.worker.engine.batching.sequence import Chunk, SequenceKey

_SPARE_ENTRIES = 64


class DeviceTime:
    """Owner of an engine's books of time, in seconds since it began."""

    def __init__(self, is_here: Callable[[SequenceKey], bool]) -> None:
        """`is_here`: whether a job still runs or waits in the engine."""
        self.busy_s = 0.0
        self.told_s = 0.0
        self.dropped_s = 0.0
        self._rest_s = 0.0
        self._owed: dict[SequenceKey, float] = {}
        self._is_here = is_here

    def divide(self, chunks: Sequence[Chunk], step_s: float) -> None:
        """Owe a step's seconds, up to its tokens, to those whose tokens it computed."""
        if len(self._owed) > _SPARE_ENTRIES + 2 * len(chunks):
            self._drop_absent()
        step_s += self._rest_s
        self._rest_s = 0.0
        self.busy_s += step_s
        token_s = step_s / sum(chunk.count for chunk in chunks)
        for chunk in chunks:
            key = chunk.sequence.key
            self._owed[key] = self._owed.get(key, 0.0) + chunk.count * token_s

    def add(self, key: SequenceKey, seconds: float) -> None:
        """Owe a job what was computed for it alone, beside the steps."""
        self.busy_s += seconds
        self._owed[key] = self._owed.get(key, 0.0) + seconds

    def add_rest(self, rest_s: float) -> None:
        """Take what the step took behind its tokens."""
        self._rest_s += rest_s

    def take(self, key: SequenceKey) -> float:
        """Return what is owed to a job, to be told with its run."""
        owed_s = self._owed.pop(key, 0.0)
        self.told_s += owed_s
        return owed_s

    def check(self) -> None:
        """Assert that no second was lost or counted twice."""
        known_s = self.told_s + self.dropped_s + sum(self._owed.values())
        assert math.isclose(self.busy_s, known_s, rel_tol=1e-6, abs_tol=1e-9)

    def _drop_absent(self) -> None:
        """Cancelled jobs and those that went elsewhere get no more runs here."""
        for key in [each for each in self._owed if not self._is_here(each)]:
            self.dropped_s += self._owed.pop(key)
