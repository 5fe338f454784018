"""Certainty of one generated answer, from its tokens' log-probabilities, and how good it is."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Measure = Callable[[Sequence[float], Sequence[float]], float]
"""From the log-probabilities of the chosen tokens and of the runners-up to a value in 0 to 1."""


def sequence_probability(chosen: Sequence[float], _: Sequence[float]) -> float:
    """Probability of the whole answer, its end included: exp of the sum."""
    return math.exp(math.fsum(chosen))


def min_token_probability(chosen: Sequence[float], _: Sequence[float]) -> float:
    """Probability of the least probable token."""
    return math.exp(min(chosen))


def mean_token_probability(chosen: Sequence[float], _: Sequence[float]) -> float:
    """Geometric mean of the token probabilities: exp of the mean log-probability."""
    return math.exp(math.fsum(chosen) / len(chosen))


def min_margin(chosen: Sequence[float], runners_up: Sequence[float]) -> float:
    """1 - (probability of the runner-up / of the chosen token), where that is smallest.

    Follows from the smallest difference d of the two log-probabilities alone: 1 - exp(-d).
    """
    return -math.expm1(-min(a - b for a, b in zip(chosen, runners_up, strict=True)))


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "sequence_probability": sequence_probability,
        "min_token_probability": min_token_probability,
        "mean_token_probability": mean_token_probability,
        "min_margin": min_margin,
    }
)
"""By name, the preferred one first; only the last needs more than the chosen tokens."""


def auroc(scores: Floats, positive: Bools) -> float:
    """Chance that a random positive scores above a random negative, ties counting half.

    The Mann-Whitney statistic. `scores` and `positive` have shape (n,); ValueError if all are
    positive or none is.
    """
    positives = int(positive.sum())
    negatives = positive.size - positives
    if positives == 0 or negatives == 0:
        raise ValueError("needs at least one positive and one negative")
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    middle_ranks = np.cumsum(sizes) - (sizes - 1) / 2
    rank_sum = float(middle_ranks[group][positive].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def best_measure(aurocs: Sequence[Mapping[str, float]], *, worth: float = 0.005) -> str:
    """The measure to use: the preferred one whose mean AUROC is within `worth` of the best.

    `aurocs` holds a mapping from measure name to AUROC for each model that may pass a question on.
    """
    means = {name: sum(each[name] for each in aurocs) / len(aurocs) for name in MEASURES}
    best = max(means.values())
    return next(name for name in MEASURES if means[name] >= best - worth)
