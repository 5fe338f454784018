"""How well a certainty measure tells right answers from wrong ones."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gearfall.core.certainty import MEASURES

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


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
