"""How much longer an engine's steps take now than they did at their best. Pure.

Steps of one shape, so many tokens and so much context, take the same time on a machine that stays
as fast as it is. The best of a shape is the smallest median of WINDOW of its steps in a row; how
slow the engine is, the median of its newest steps, each over the best of its shape. Whatever the
reason is for: a lower clock, a neighbour, another engine of the same worker that computes.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from services.worker.engine.batching.sequence import Chunk

WINDOW = 16
"""Steps of a shape whose median is one look at it."""
NEWEST = 64
"""Steps that say how slow the engine is."""
MAX_SHAPES = 1024
"""That are remembered; beyond, the one that was met least lately is forgotten."""
_EXACT_BITS = 3
"""After a number's first one: the bits behind them make no other shape, so that each eighth of a
power of two begins one."""
_CONTEXT_TOKENS = WINDOW
"""Of context that one job goes through while its steps are looked at once."""

Shape = tuple[int, int]


@dataclass(slots=True)
class _Seen:
    """Of one shape."""

    best_s: float = math.inf
    """Infinite before it was looked at."""
    steps_s: list[float] = field(default_factory=list)
    """Since it was looked at last."""


class Slowdown:
    """Owner of what an engine's steps took at their best and lately, in seconds on any clock."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Shape, _Seen] = OrderedDict()
        self._newest: deque[float] = deque(maxlen=NEWEST)
        self._unread = 0
        self.ratio = 0.0
        """Of the newest steps' times to their best; 0 while unknown."""

    def note(self, chunks: Sequence[Chunk], step_s: float) -> None:
        """Take a step in that computed these chunks."""
        shape = shape_of(chunks)
        seen = self._seen.setdefault(shape, _Seen())
        self._seen.move_to_end(shape)
        if len(self._seen) > MAX_SHAPES:
            self._seen.popitem(last=False)
        seen.steps_s.append(step_s)
        if len(seen.steps_s) == WINDOW:
            seen.best_s = min(median(seen.steps_s), seen.best_s)
            seen.steps_s.clear()
        if 0.0 < seen.best_s < math.inf:
            self._newest.append(step_s / seen.best_s)
            self._unread += 1
        if self._unread == WINDOW:
            # A median a step would cost a small model's engine some of its step.
            self._unread = 0
            self.ratio = median(self._newest)


def shape_of(chunks: Sequence[Chunk]) -> Shape:
    """Return what steps that should take the same time have in common.

    Two of one shape differ by less than an eighth in their tokens, and by that or less than
    _CONTEXT_TOKENS in their context: so much at most in the time in proportion to either.
    """
    tokens = context = 0
    for chunk in chunks:
        tokens += chunk.count
        context += chunk.start
    return _eighth(tokens), _eighth(context // _CONTEXT_TOKENS)


def _eighth(number: int) -> int:
    """Return the first number that counts as the same."""
    spare_bits = max(0, number.bit_length() - 1 - _EXACT_BITS)
    return number >> spare_bits << spare_bits
