"""How much longer an engine's steps take now than they did at their best. Pure.

Steps of one shape, so many tokens and so much context, take the same time on a machine that stays
as fast as it is. The best of a shape is the smallest median of WINDOW of its steps in a row; how
slow the engine is, the median of its newest steps, each over the best of its shape. Whatever the
reason is for: a lower clock, a neighbour, another engine of the same worker that computes.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

from services.worker.engine.sequence import Chunk

WINDOW = 16
"""Steps of a shape whose median is one look at it."""
NEWEST = 64
"""Steps that say how slow the engine is."""
_EXACT_TOKENS = 16
"""Up to which each number of tokens is a shape of its own; above, each power of two begins one."""

Shape = tuple[int, int]


class Slowdown:
    """Owner of what an engine's steps took at their best and lately, in seconds on any clock."""

    def __init__(self) -> None:
        self._best_s: dict[Shape, float] = {}
        self._looked_at: dict[Shape, list[float]] = {}
        self._newest: deque[float] = deque(maxlen=NEWEST)
        self._unread = 0
        self.ratio = 0.0
        """Of the newest steps' times to their best; 0 while unknown."""

    def note(self, chunks: Sequence[Chunk], step_s: float) -> None:
        """Take a step in that computed these chunks."""
        shape = shape_of(chunks)
        seen = self._looked_at.setdefault(shape, [])
        seen.append(step_s)
        if len(seen) == WINDOW:
            look_s = median(seen)
            self._best_s[shape] = min(look_s, self._best_s.get(shape, look_s))
            seen.clear()
        if (best_s := self._best_s.get(shape, 0.0)) > 0.0:
            self._newest.append(step_s / best_s)
            self._unread += 1
        if self._unread == WINDOW:
            # A median a step would cost a small model's engine some of its step.
            self._unread = 0
            self.ratio = median(self._newest)


def shape_of(chunks: Sequence[Chunk]) -> Shape:
    """Return what steps that should take the same time have in common."""
    tokens = context = 0
    for chunk in chunks:
        tokens += chunk.count
        context += chunk.start
    kind = tokens if tokens <= _EXACT_TOKENS else _EXACT_TOKENS + tokens.bit_length()
    return kind, context.bit_length()
