"""How long a migration will take by tokens and by KV, fitted to those that were made. Pure.

By tokens the target computes what the source has: a * (t_in + t_out) + b, ServerlessLLM's estimate
(arXiv 2401.14351, section 6). By KV it is sent: bytes / bandwidth + overhead. Both are lines,
fitted by Theil and Sen (the median of the slopes between all pairs), which a quarter of outliers
does not bend. A path is tried until it was measured, first by KV, and by tokens with short jobs
only: recomputing a long one is what KV is sent for. From then on the path that is expected to be
faster is taken.
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from gearfall.core.ids import ModelName

KEPT = 32
"""Newest migrations of one path to one target that a fit looks at."""
MEASURED = 2
"""So many migrations make a path measured."""
TRIED_TOKENS = 512
"""Longest job that goes by tokens to find out how long that takes, where KV can be sent."""

Sample = tuple[float, float]
"""(size, seconds)."""


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = per_unit_s * size + fixed_s."""

    per_unit_s: float
    fixed_s: float

    def at(self, size: float) -> float:
        """Return the seconds for a size."""
        return self.per_unit_s * size + self.fixed_s


def fit_line(samples: tuple[Sample, ...]) -> Line:
    """Return the line through at least one sample, with neither part below 0.

    Sizes that hardly differ say nothing about the slope: all is taken to be proportional then.
    """
    slopes = [
        (s2 - s1) / (x2 - x1)
        for (x1, s1), (x2, s2) in combinations(samples, 2)
        if abs(x2 - x1) > 0.1 * max(x1, x2)
    ]
    if not slopes:
        return Line(median(s / x for x, s in samples if x > 0), 0.0)
    slope = max(0.0, median(slopes))
    fixed = median(s - slope * x for x, s in samples)
    if fixed < 0.0:
        return Line(median(s / x for x, s in samples if x > 0), 0.0)
    return Line(slope, fixed)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which way a job goes and why."""

    by_kv: bool
    predicted_s: float
    """Of the path taken; 0 when it was not measured yet."""
    other_s: float
    """Of the path not taken; 0 when it was not measured yet, or can't be had."""


class MigrationCosts:
    """The migrations that left one worker, and what they say about the next one."""

    def __init__(self) -> None:
        self._samples: defaultdict[tuple[ModelName, str, bool], deque[Sample]]
        self._samples = defaultdict(lambda: deque(maxlen=KEPT))

    def note(
        self, model: ModelName, target: str, size: float, seconds: float, *, by_kv: bool
    ) -> None:
        """A migration of so many tokens (by KV: bytes) took so long."""
        if size > 0 and seconds > 0:
            self._samples[model, target, by_kv].append((size, seconds))

    def predict(self, model: ModelName, target: str, size: float, *, by_kv: bool) -> float:
        """Return the expected seconds; 0 when that was not measured yet, to any target."""
        samples = tuple(self._samples.get((model, target, by_kv), ()))
        if len(samples) < MEASURED:
            samples = tuple(
                sample
                for (other, _, other_kv), kept in self._samples.items()
                if other == model and other_kv == by_kv
                for sample in kept
            )
        return fit_line(samples).at(size) if len(samples) >= MEASURED else 0.0

    def choose(
        self, model: ModelName, target: str, *, tokens: int, kv_bytes: int, can_kv: bool
    ) -> Choice:
        """Return the path for a job of so many tokens, prompt and answer."""
        by_tokens_s = self.predict(model, target, tokens, by_kv=False)
        by_kv_s = self.predict(model, target, kv_bytes, by_kv=True) if can_kv else 0.0
        is_tried = by_tokens_s == 0.0 and tokens <= TRIED_TOKENS
        is_faster = not is_tried and not 0.0 < by_tokens_s < by_kv_s
        if can_kv and (by_kv_s == 0.0 or is_faster):
            return Choice(by_kv=True, predicted_s=by_kv_s, other_s=by_tokens_s)
        return Choice(by_kv=False, predicted_s=by_tokens_s, other_s=by_kv_s)
