"""How fast one model answers, learned from its answers: medians over the newest, so that one odd
answer (a migration, a busy moment) moves nothing.

Time to the first token is a line over the prompt tokens that had to be computed, by Theil and Sen:
the median slope of all pairs, then the median intercept. Time after it is proportional to the
further tokens: the median of the seconds a token. A step is slower than that where answers come
with drafts, whose right tokens take none.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

NEWEST = 32
"""Answers that count."""
FIT_EVERY = 8
"""Answers after which the line is fitted anew; at first, after each."""


@dataclass(frozen=True, slots=True)
class Line:
    """`at_zero + slope * tokens`, in seconds."""

    at_zero: float
    slope: float

    def at(self, tokens: int) -> float:
        """Return the seconds for so many tokens, at least 0."""
        return max(0.0, self.at_zero + self.slope * tokens)


@dataclass(frozen=True, slots=True)
class Timing:
    """What one answer took, from the moment a worker had claimed it."""

    computed_tokens: int
    """Of the prompt: those that the engine did not have."""
    first_token_s: float
    further_tokens: int
    """Behind the first."""
    further_s: float
    """From the first to the last."""
    right_draft_tokens: int = 0
    """That a draft had brought: each spared its step."""


class ModelPace:
    """Owner of what is known about one model's speed."""

    def __init__(self) -> None:
        self._firsts: deque[tuple[int, float]] = deque(maxlen=NEWEST)
        self._paces: deque[float] = deque(maxlen=NEWEST)
        self._line: Line | None = None
        self._token_s = 0.0
        self._steps: deque[float] = deque(maxlen=NEWEST)
        self._step_s = 0.0
        self._since_fit = 0

    def learn(self, timing: Timing) -> None:
        """Take one whole answer."""
        self._firsts.append((timing.computed_tokens, timing.first_token_s))
        if timing.further_tokens > 0:
            self._paces.append(timing.further_s / timing.further_tokens)
        if (steps := timing.further_tokens - timing.right_draft_tokens) > 0:
            self._steps.append(timing.further_s / steps)
        self._since_fit += 1
        if len(self._firsts) <= FIT_EVERY or self._since_fit >= FIT_EVERY:
            self._since_fit = 0
            self._line = theil_sen(tuple(self._firsts))
            self._token_s = median(self._paces) if self._paces else 0.0
            self._step_s = median(self._steps) if self._steps else 0.0

    @property
    def step_s(self) -> float:
        """Seconds a token behind the first that no draft brought; 0 before any was learned."""
        return self._step_s

    @property
    def prompt_token_s(self) -> float:
        """Seconds by which each further token of a prompt makes the first one later."""
        return self._line.slope if self._line else 0.0

    def answer_s(self, computed_tokens: int, answer_tokens: float) -> float:
        """Return the seconds from claim to the last token; 0 before anything was learned.

        Of an answer that comes with a draft as often as those that were learned from.
        """
        if self._line is None:
            return 0.0
        return self._line.at(computed_tokens) + self._token_s * max(0.0, answer_tokens - 1)


class UsualLength:
    """Median tokens of the newest answers; owner of one deployment's stage."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=NEWEST)

    def learn(self, tokens: int) -> None:
        """Take one answer."""
        self._lengths.append(tokens)

    def tokens(self, at_most: int) -> float:
        """Return the expected length; 0 before any answer."""
        return min(float(at_most), median(self._lengths)) if self._lengths else 0.0


def theil_sen(points: Sequence[tuple[int, float]]) -> Line:
    """Fit a line that rises or is level; one point or equal tokens say nothing about a slope."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2]
    slope = max(0.0, median(slopes)) if slopes else 0.0
    return Line(median(y - slope * x for x, y in points), slope)
