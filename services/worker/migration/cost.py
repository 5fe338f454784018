"""How long a migration will take by tokens and by KV, fitted to those that were made. Pure.

By tokens the target computes what the source has: ServerlessLLM's estimate is
a * (t_in + t_out) + b (arXiv 2401.14351, section 6), but a token attends to all that are before it,
so that here a token's time is itself a line of the job's length t: (a + c * t) * t + b. By KV it is
sent: bytes / bandwidth + b. The source knows when the bulk was there, which tells b apart from the
rest though all jobs were of one length. Lines are fitted by Theil and Sen (the median of the slopes
between all pairs), which a quarter of outliers does not bend.

Either path is tried until one slow move among them says nothing, tokens with short jobs and while
they seem not much slower: recomputing a long one is what KV is sent for. From then on the path that
is expected to be faster is taken.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from statistics import median

from gearfall.core.ids import ModelName

KEPT = 32
"""Newest migrations of one path to one target that a fit looks at."""
MEASURED = 2
"""So many migrations make a line; one alone is taken to be proportional to its size."""
TRIED = 3
"""So many first migrations go by KV where it can be sent, so many of short jobs by tokens."""
TRIED_RATIO = 2.0
"""But none by tokens that seems to take so many times as long, once one was made."""
TRIED_TOKENS = 512
"""Longest job that goes by tokens to find out how long that takes, where KV can be sent."""


class DataPath(Enum):
    """How what the target needs gets there."""

    TOKENS = "tokens"
    """Token ids; the target computes keys and values again."""
    KV = "kv"
    """Keys and values over a socket of their own."""
    KV_STREAM = "kv_stream"
    """Keys and values over gRPC: where the socket can't be connected."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One migration."""

    size: float
    """Tokens, by KV bytes."""
    seconds: float
    bulk_s: float
    """The part of `seconds` in which the bulk was computed or sent."""


Point = tuple[float, float]
"""(place, value)."""


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = per_unit_s * size + fixed_s."""

    per_unit_s: float
    fixed_s: float

    def at(self, size: float) -> float:
        """Return the seconds for a size."""
        return self.per_unit_s * size + self.fixed_s


UNKNOWN_COST = Line(0.0, 0.0)
"""While nothing was measured."""


def fit_line(points: Sequence[Point]) -> Line | None:
    """Return the line through points, which may fall; None where places hardly differ."""
    slopes = [
        (y2 - y1) / (x2 - x1)
        for (x1, y1), (x2, y2) in combinations(points, 2)
        if abs(x2 - x1) > 0.1 * max(x1, x2)
    ]
    if not slopes:
        return None
    slope = median(slopes)
    return Line(slope, median(y - slope * x for x, y in points))


def fit_linear(samples: Sequence[Sample]) -> Line:
    """Return the seconds of at least one migration as a line of its size, neither part below 0."""
    line = fit_line([(each.size, each.seconds) for each in samples])
    if line is None or line.fixed_s < 0.0:
        return Line(median(each.bulk_s / each.size for each in samples), _rest_s(samples))
    if line.per_unit_s < 0.0:
        return Line(0.0, median(each.seconds for each in samples))
    return line


def fit_bent(samples: Sequence[Sample], size: float) -> Line:
    """Return the line for jobs of about `size` tokens where each token takes longer in a longer
    job, from at least one sample.
    """
    rates = [(each.size, each.bulk_s / each.size) for each in samples]
    line = fit_line(rates)
    if line is None or min(line.per_unit_s, line.fixed_s) < 0.0:
        line = Line(0.0, median(rate for _, rate in rates))
    return Line(line.at(size), _rest_s(samples))


def _rest_s(samples: Sequence[Sample]) -> float:
    return median(each.seconds - each.bulk_s for each in samples)


def _fit(path: DataPath, samples: Sequence[Sample], size: float) -> Line:
    return fit_bent(samples, size) if path is DataPath.TOKENS else fit_linear(samples)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which way a job goes and why."""

    path: DataPath
    predicted_s: float
    """Of the path taken; 0 when it was not measured yet."""
    other_s: float
    """Of the path not taken; 0 when it was not measured yet, or can't be had."""


class MigrationCosts:
    """The migrations that left one worker, and what they say about the next one."""

    def __init__(self) -> None:
        self._samples: defaultdict[tuple[ModelName, str, DataPath], deque[Sample]]
        self._samples = defaultdict(lambda: deque(maxlen=KEPT))

    def note(self, model: ModelName, target: str, path: DataPath, sample: Sample) -> None:
        """A migration was made."""
        if sample.size > 0 and sample.seconds > 0:
            self._samples[model, target, path].append(sample)

    def predict(self, model: ModelName, target: str, path: DataPath, size: float) -> float:
        """Return the expected seconds; 0 when that was not measured yet, to any target."""
        samples = self._known(model, target, path)
        return _fit(path, samples, size).at(size) if samples else 0.0

    def choose(
        self,
        model: ModelName,
        target: str,
        *,
        tokens: int,
        kv_bytes: int,
        kv_path: DataPath | None,
    ) -> Choice:
        """Return the path for a job of so many tokens, prompt and answer.

        `kv_path`: how keys and values get to this target; None where they can't.
        """
        by_tokens_s = self.predict(model, target, DataPath.TOKENS, tokens)
        if kv_path is None:
            return Choice(DataPath.TOKENS, predicted_s=by_tokens_s, other_s=0.0)
        by_kv_s = self.predict(model, target, kv_path, kv_bytes)
        if len(self._known(model, target, kv_path)) < TRIED:
            is_kv = True
        elif len(self._known(model, target, DataPath.TOKENS)) < TRIED and tokens <= TRIED_TOKENS:
            is_kv = by_tokens_s >= TRIED_RATIO * by_kv_s
        elif by_tokens_s == 0.0:
            is_kv = True
        else:
            is_kv = by_kv_s <= by_tokens_s
        if is_kv:
            return Choice(kv_path, predicted_s=by_kv_s, other_s=by_tokens_s)
        return Choice(DataPath.TOKENS, predicted_s=by_tokens_s, other_s=by_kv_s)

    def line_of(self, model: ModelName, kv_token_bytes: int) -> Line:
        """Return what moving a job of the model costs by its tokens, to whichever target.

        Of the path that is faster for a job of the middle length among those that moved;
        `UNKNOWN_COST` while no path was measured. `kv_token_bytes`: 0 where KV can't be sent.
        """
        lines, sizes = [], []
        for path in DataPath:
            samples = self._pooled(model, path)
            unit_bytes = 1 if path is DataPath.TOKENS else kv_token_bytes
            if len(samples) < MEASURED or unit_bytes == 0:
                continue
            line = _fit(path, samples, median(each.size for each in samples))
            lines.append(Line(line.per_unit_s * unit_bytes, line.fixed_s))
            sizes += [each.size / unit_bytes for each in samples]
        return min(lines, key=lambda line: line.at(median(sizes)), default=UNKNOWN_COST)

    def _known(self, model: ModelName, target: str, path: DataPath) -> tuple[Sample, ...]:
        """Return what was measured to this target, to all while that is not enough for a line."""
        samples = tuple(self._samples.get((model, target, path), ()))
        return samples if len(samples) >= MEASURED else self._pooled(model, path)

    def _pooled(self, model: ModelName, path: DataPath) -> tuple[Sample, ...]:
        """Return what was measured to all targets."""
        return tuple(
            sample
            for (other, _, other_path), kept in self._samples.items()
            if other == model and other_path is path
            for sample in kept
        )
