"""Certainty of one generated answer, a value in 0 to 1 from its tokens' log-probabilities.

Every generated token counts, the end-of-sequence token included: whether the answer is over is part
of the answer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from gearfall.core.certainty.token_entropy import pair_entropy
from gearfall.core.errors import InvalidRequest

Measure = Callable[[Sequence[float], Sequence[float]], float]
"""From log-probabilities and margins, one each a token and at least one, to a value in 0 to 1."""


def _sequence_probability(logprobs: Sequence[float], _margins: Sequence[float]) -> float:
    """Probability of the whole answer: exp of the sum."""
    return math.exp(math.fsum(logprobs))


def _mean_token_probability(logprobs: Sequence[float], _margins: Sequence[float]) -> float:
    """Geometric mean of the token probabilities: exp of the mean."""
    return math.exp(math.fsum(logprobs) / len(logprobs))


def _min_token_probability(logprobs: Sequence[float], _margins: Sequence[float]) -> float:
    """Probability of the least probable token."""
    return math.exp(min(logprobs))


def _min_margin(logprobs: Sequence[float], margins: Sequence[float]) -> float:
    """Smallest p(token) x (1 - p(second) / p(first)).

    For a token that was the most likely one this is its lead p(first) - p(second).
    """
    return min(
        math.exp(logprob) * -math.expm1(-margin)
        for logprob, margin in zip(logprobs, margins, strict=True)
    )


def _entropy(logprobs: Sequence[float], margins: Sequence[float]) -> float:
    """exp of minus the mean entropy of the next token, of which a lower bound is known."""
    return math.exp(-math.fsum(map(pair_entropy, logprobs, margins)) / len(logprobs))


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "sequence_probability": _sequence_probability,
        "mean_token_probability": _mean_token_probability,
        "min_token_probability": _min_token_probability,
        "min_margin": _min_margin,
        "entropy": _entropy,
    }
)
"""By the names that a deployment uses."""


def parse_measure(name: str) -> str:
    """Return `name` if it names a measure, else raise InvalidRequest."""
    if name not in MEASURES:
        known = ", ".join(MEASURES)
        raise InvalidRequest(f"certainty {name!r} is not one of {known}", param="certainty")
    return name


def answer_probability(logprobs: Sequence[float]) -> float:
    """Return the probability of a whole answer by its model, in [0, 1]; 0 for one of no tokens."""
    return measure_certainty("sequence_probability", logprobs, ())


def measure_certainty(measure: str, logprobs: Sequence[float], margins: Sequence[float]) -> float:
    """Return the certainty of an answer by `measure`; an answer without tokens has certainty 0.

    A log-probability that is not a number makes the answer uncertain (0): it never passes for sure.
    """
    if not logprobs:
        return 0.0
    value = MEASURES[measure](logprobs, margins)
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
