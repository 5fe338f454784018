"""The most certainty that an answer can still reach, while it is being generated.

A draft whose certainty can't reach its stage's threshold any more will go up whatever follows, so
nothing is lost by stopping it there. `k` tokens are there, up to `r` may follow; log-probabilities
are at most 0, margins at least 0.

| measure                | most that can come of it                                          |
| ---------------------- | ----------------------------------------------------------------- |
| sequence_probability   | as it is: every token multiplies by at most 1                     |
| min_token_probability  | as it is: a minimum never rises                                   |
| min_margin             | as it is                                                          |
| mean_token_probability | exp(sum / (k + r)): r tokens that are certain                     |
| entropy                | exp(-sum of entropies / (k + r)): the same                        |
| calibrated             | each feature at that end of its range which its weight likes      |
|                        | better, then through the curve, which rises: a bound, though no   |
|                        | answer may reach it                                               |

A measure or feature that does not stand here can reach 1: nothing is ever stopped by it.
"""

import math
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from gearfall.core.certainty.calibration import Calibration, probability_of_score
from gearfall.core.certainty.certainty_features import FLOOR, clean_logprob, clean_margin, quantile
from gearfall.core.certainty.token_entropy import pair_entropy

_MOST_ENTROPY = -2 * FLOOR
"""Of a token whose log-probability and margin are clean: of the second that they tell of."""
_SLACK = 1e-9
"""Relative: sums grow token by token here and are rounded once at the end of an answer."""


class CertaintyBound(Protocol):
    """Feeds on an answer's tokens as they come."""

    def add(self, logprob: float, margin: float) -> None:
        """One more token."""
        ...

    def most(self, tokens_left: int) -> float:
        """Return a value in [0, 1] that no answer exceeds which has at most so many more tokens."""
        ...


def bound_of(measure: str, calibration: Calibration | None = None) -> CertaintyBound:
    """Return the bound of a measure, or of `calibration`, which stands in its place."""
    if calibration is not None:
        return _CalibratedBound(calibration)
    return _MEASURE_BOUNDS.get(measure, _NoBound)()


def has_bound(measure: str, calibration: Calibration | None = None) -> bool:
    """Whether a draft can be stopped early by this measure at all."""
    if calibration is not None:
        return all(name in _RANGES for name in calibration.features)
    return measure in _MEASURE_BOUNDS


class _NoBound:
    def add(self, logprob: float, margin: float) -> None:
        pass

    def most(self, tokens_left: int) -> float:  # noqa: ARG002 - others need it
        return 1.0


class _SumBound:
    """Sequence probability, and what the means share."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def add(self, logprob: float, margin: float) -> None:  # noqa: ARG002 - others need it
        self._sum += logprob
        self._count += 1

    def most(self, tokens_left: int) -> float:  # noqa: ARG002 - others need it
        return _probability(self._sum)


class _MeanBound(_SumBound):
    def most(self, tokens_left: int) -> float:
        return _probability(self._sum / max(self._count + tokens_left, 1))


class _EntropyBound(_MeanBound):
    def add(self, logprob: float, margin: float) -> None:
        super().add(-pair_entropy(logprob, margin), margin)


class _MinBound:
    """Like `min` over the tokens, what that does with a value that is no number included."""

    def __init__(self) -> None:
        self._least: float | None = None

    def add(self, logprob: float, margin: float) -> None:
        value = self._value(logprob, margin)
        if self._least is None or value < self._least:
            self._least = value

    def _value(self, logprob: float, margin: float) -> float:  # noqa: ARG002 - others need it
        return logprob

    def _certainty(self, least: float) -> float:
        return math.exp(least)

    def most(self, tokens_left: int) -> float:  # noqa: ARG002 - others need it
        return 1.0 if self._least is None else _in_range(self._certainty(self._least))


class _MinMarginBound(_MinBound):
    def _value(self, logprob: float, margin: float) -> float:
        return math.exp(logprob) * -math.expm1(-margin)

    def _certainty(self, least: float) -> float:
        return least


_MEASURE_BOUNDS: Mapping[str, Callable[[], CertaintyBound]] = MappingProxyType(
    {
        "sequence_probability": _SumBound,
        "mean_token_probability": _MeanBound,
        "min_token_probability": _MinBound,
        "min_margin": _MinMarginBound,
        "entropy": _EntropyBound,
    }
)


class _CalibratedBound:
    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._is_bounded = has_bound("", calibration)
        self._seen = _Seen()

    def add(self, logprob: float, margin: float) -> None:
        self._seen.add(clean_logprob(logprob), clean_margin(margin))

    def most(self, tokens_left: int) -> float:
        if not self._is_bounded or not self._seen.count:
            return 1.0
        it = self._calibration
        score, size = it.bias, abs(it.bias)
        for name, mean, scale, weight in zip(
            it.features, it.means, it.scales, it.weights, strict=True
        ):
            least, most = _RANGES[name](self._seen, tokens_left)
            score += max((least - mean) / scale * weight, (most - mean) / scale * weight)
            size += abs(weight) / scale * (1.0 + max(-least, most) + abs(mean))
        return _in_range(probability_of_score(it, score + _SLACK * size) + _SLACK)


class _Seen:
    """What the features of an answer's beginning need, cleaned as they clean it."""

    __slots__ = (
        *("count", "first", "ordered", "total", "least_margin", "margins"),
        *("entropy", "most_entropy"),
    )

    def __init__(self) -> None:
        self.count = 0
        self.first = 0.0
        self.ordered: list[float] = []
        self.total = 0.0
        self.least_margin = math.inf
        self.margins = 0.0
        self.entropy = 0.0
        self.most_entropy = 0.0

    def add(self, logprob: float, margin: float) -> None:
        if not self.count:
            self.first = logprob
        self.count += 1
        insort(self.ordered, logprob)
        self.total += logprob
        self.least_margin = min(self.least_margin, margin)
        self.margins += margin
        entropy = pair_entropy(logprob, margin)
        self.entropy += entropy
        self.most_entropy = max(self.most_entropy, entropy)


_Range = Callable[[_Seen, int], tuple[float, float]]
"""From the tokens seen and how many may follow to a feature's least and most."""


def _quantile_range(share: float) -> _Range:
    """More of the worst tokens only lower a quantile, more of the best only raise it."""

    def feature(seen: _Seen, left: int) -> tuple[float, float]:
        return (
            _quantile_with(share, seen.ordered, below=left, value=FLOOR),
            _quantile_with(share, seen.ordered, above=left, value=0.0),
        )

    return feature


def _quantile_with(
    share: float, ordered: Sequence[float], *, value: float, below: int = 0, above: int = 0
) -> float:
    """Return the quantile of `ordered` with so many of `value` before or behind it."""
    count = len(ordered)

    def at(position: int) -> float:
        inside = position - below
        return ordered[inside] if 0 <= inside < count else value

    return quantile(share, at, below + count + above)


def _mean_range(seen: _Seen, left: int) -> tuple[float, float]:
    count = seen.count + left
    return (seen.total + left * FLOOR) / count, seen.total / count


def _sum_range(seen: _Seen, left: int) -> tuple[float, float]:
    return max(seen.total + left * FLOOR, 10 * FLOOR), max(seen.total, 10 * FLOOR)


def _first_range(seen: _Seen, _left: int) -> tuple[float, float]:
    return seen.first, seen.first


def _min_margin_range(seen: _Seen, left: int) -> tuple[float, float]:
    return (0.0 if left else seen.least_margin), seen.least_margin


def _mean_margin_range(seen: _Seen, left: int) -> tuple[float, float]:
    count = seen.count + left
    return seen.margins / count, (seen.margins - left * FLOOR) / count


def _mean_entropy_range(seen: _Seen, left: int) -> tuple[float, float]:
    count = seen.count + left
    return seen.entropy / count, (seen.entropy + left * _MOST_ENTROPY) / count


def _max_entropy_range(seen: _Seen, left: int) -> tuple[float, float]:
    return seen.most_entropy, max(seen.most_entropy, _MOST_ENTROPY if left else 0.0)


def _log_length_range(seen: _Seen, left: int) -> tuple[float, float]:
    return math.log(seen.count), math.log(seen.count + left)


_RANGES: Mapping[str, _Range] = MappingProxyType(
    {
        "min": _quantile_range(0.0),
        "q10": _quantile_range(0.1),
        "q25": _quantile_range(0.25),
        "q50": _quantile_range(0.5),
        "mean": _mean_range,
        "sum": _sum_range,
        "first": _first_range,
        "min_margin": _min_margin_range,
        "mean_margin": _mean_margin_range,
        "log_length": _log_length_range,
        "mean_entropy": _mean_entropy_range,
        "max_entropy": _max_entropy_range,
    }
)
"""Of each feature in `gearfall.core.certainty.certainty_features`, by name."""


def _probability(log_value: float) -> float:
    return _in_range(math.exp(log_value + _SLACK * max(1.0, -log_value)))


def _in_range(value: float) -> float:
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
