"""How long a migration will take by tokens and by KV, fitted to those that were made. Pure.

By tokens the target computes what the source has: a * (t_in + t_out) + b, ServerlessLLM's estimate
(arXiv 2401.14351, section 6). By KV it is sent: bytes / bandwidth + overhead. Both are lines,
fitted by Theil and Sen (the median of the slopes between all pairs), which a quarter of outliers
does not bend. A token's attention grows with what is before it and a group of blocks has a fixed
part, so no one line fits short jobs and long ones: each prediction's goes through the moves that
are nearest in size. Where those are all of one size they still say what part of their time grew
with it, as the source knows when the bulk was on its way.

KV is tried until one slow move among them says nothing, tokens once and with a short
job: recomputing a long one is what KV is sent for. From then on the path that is expected to be
faster is taken.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from math import log
from statistics import median

from gearfall.core.ids import ModelName

KEPT = 32
"""Newest migrations of one path to one target that a fit looks at."""
MEASURED = 2
"""So many migrations make a line; one alone is taken to be proportional to its size."""
NEAREST = 9
"""So many of them, nearest in size, make the line of one prediction."""
TRIED = 3
"""So many first migrations go by KV where it can be sent."""
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


def fit_line(samples: Sequence[Sample]) -> Line:
    """Return the line through at least one sample, with a slope of at least 0.

    Between samples it holds whatever its fixed part, which may be below 0; beyond them ask
    `fit_beyond`. Sizes that hardly differ say nothing about the slope: the bulk's part does then.
    """
    slopes = [
        (b.seconds - a.seconds) / (b.size - a.size)
        for a, b in combinations(samples, 2)
        if abs(b.size - a.size) > 0.1 * max(a.size, b.size)
    ]
    slope = max(0.0, median(slopes)) if slopes else _bulk_slope(samples)
    return Line(slope, median(each.seconds - slope * each.size for each in samples))


def fit_beyond(samples: Sequence[Sample]) -> Line:
    """Return the line through at least one sample with neither part below 0."""
    line = fit_line(samples)
    if line.fixed_s >= 0.0:
        return line
    slope = _bulk_slope(samples)
    return Line(slope, median(each.seconds - slope * each.size for each in samples))


def predict(samples: Sequence[Sample], size: float) -> float:
    """Return the seconds for a size, by those of at least one sample that are nearest to it."""
    newest_first = reversed(samples)
    nearest = sorted(newest_first, key=lambda each: abs(log(each.size / size)))[:NEAREST]
    sizes = [each.size for each in nearest]
    is_between = min(sizes) <= size <= max(sizes)
    line = fit_line(nearest) if is_between else fit_beyond(nearest)
    return max(line.at(size), min(each.seconds for each in nearest) * min(1.0, size / min(sizes)))


def _bulk_slope(samples: Sequence[Sample]) -> float:
    return median(each.bulk_s / each.size for each in samples)


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
        return predict(samples, size) if samples and size > 0 else 0.0

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
        elif by_tokens_s == 0.0:
            is_kv = tokens > TRIED_TOKENS
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
            line = fit_beyond(samples)
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
