"""Numbers that say how sure a generation was, from its tokens' log-probabilities and margins.

Defined for every answer, the empty one included: an answer without tokens looks like one whose only
token was next to impossible.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from gearfall.core.certainty.token_entropy import pair_entropy

FLOOR = -30.0
"""Log-probabilities below this, and those that are no numbers, count as this."""

Feature = Callable[[Sequence[float], Sequence[float]], float]
"""From log-probabilities and margins, cleaned, one each a token and at least one."""


def quantile(share: float, ordered_at: Callable[[int], float], count: int) -> float:
    """Return the quantile of `count` values, by rank from `ordered_at`; linear between two."""
    at = share * (count - 1)
    low = int(at)
    least, most = ordered_at(low), ordered_at(min(low + 1, count - 1))
    return least + (at - low) * (most - least)


def _quantile(share: float) -> Feature:
    def feature(logprobs: Sequence[float], _margins: Sequence[float]) -> float:
        return quantile(share, sorted(logprobs).__getitem__, len(logprobs))

    return feature


def _mean(logprobs: Sequence[float], _margins: Sequence[float]) -> float:
    return math.fsum(logprobs) / len(logprobs)


def _sum(logprobs: Sequence[float], _margins: Sequence[float]) -> float:
    return max(math.fsum(logprobs), 10 * FLOOR)


def _first(logprobs: Sequence[float], _margins: Sequence[float]) -> float:
    return logprobs[0]


def _min_margin(_logprobs: Sequence[float], margins: Sequence[float]) -> float:
    return min(margins)


def _mean_margin(_logprobs: Sequence[float], margins: Sequence[float]) -> float:
    return math.fsum(margins) / len(margins)


def _mean_entropy(logprobs: Sequence[float], margins: Sequence[float]) -> float:
    return math.fsum(map(pair_entropy, logprobs, margins)) / len(logprobs)


def _max_entropy(logprobs: Sequence[float], margins: Sequence[float]) -> float:
    return max(map(pair_entropy, logprobs, margins))


def _log_length(logprobs: Sequence[float], _margins: Sequence[float]) -> float:
    return math.log(len(logprobs))


FEATURES: Mapping[str, Feature] = MappingProxyType(
    {
        "min": _quantile(0.0),
        "q10": _quantile(0.1),
        "q25": _quantile(0.25),
        "q50": _quantile(0.5),
        "mean": _mean,
        "sum": _sum,
        "first": _first,
        "min_margin": _min_margin,
        "mean_margin": _mean_margin,
        "log_length": _log_length,
        "mean_entropy": _mean_entropy,
        "max_entropy": _max_entropy,
    }
)
"""By name. Log-probabilities in nats; a margin is log p(token) - log p(second), at most -FLOOR.
Entropies are lower bounds, from these two (`gearfall.core.certainty.token_entropy`)."""

USUAL_FEATURES = tuple(name for name in FEATURES if not name.endswith("_entropy"))
"""What calibrations are fitted on if nothing else is asked for: beside these, the entropies told
nothing more about right and wrong where it was measured."""


def features_of(
    names: Sequence[str], logprobs: Sequence[float], margins: Sequence[float]
) -> tuple[float, ...]:
    """Return the named features, finite all of them, whatever the engine sent."""
    if not logprobs:
        logprobs, margins = (FLOOR,), (0.0,)
    clean = [clean_logprob(each) for each in logprobs]
    leads = [clean_margin(each) for each in margins]
    return tuple(FEATURES[name](clean, leads) for name in names)


def clean_logprob(logprob: float) -> float:
    """Return a log-probability between FLOOR and 0."""
    return FLOOR if math.isnan(logprob) else max(FLOOR, min(0.0, logprob))


def clean_margin(margin: float) -> float:
    """Return a margin between 0 and -FLOOR."""
    return 0.0 if math.isnan(margin) else max(0.0, min(-FLOOR, margin))
