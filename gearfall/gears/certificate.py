"""Which cascades keep a quality target, with a stated probability of being wrong.

Learn then Test (arXiv 2110.01052): each cascade of a path is a hypothesis "its quality is below the
target" with a p-value that holds for any distribution. Cascades are tested from the safest to the
cheapest, each at level delta, until the first that can't be rejected (fixed-sequence testing,
section 4.2 there): the probability that any accepted one is below the target is at most delta. The
path has to come from other queries than those that test it.

`population`: the target is about the source of the queries. p-value of k right answers of n: the
binomial tail P(Bin(n, target) >= k); for judged answers in [0, 1] the Hoeffding-Bentkus bound.
`next_queries`: the target is about the mean over the next m queries themselves, which varies too.
With K right ones among all n + m in random order, k of them in the n seen, the chance to see k or
more while the m have less than t = ceil(target m) is largest for K = k + t - 1: the p-value is
P(Hypergeometric(n + m, k + t - 1, n) >= k). Here the hypotheses are random, so that each of the
tests gets an equal share of delta instead (Bonferroni).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gearfall.core.errors import InvalidRequest
from gearfall.gears.answers import FloatArray

_EXACT_TARGETS = 60
"""Halvings of the interval that a bound lies in."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is known of an accepted cascade's quality."""

    target: float
    delta: float
    """Probability that the quality is below the target all the same, at most."""
    queries: int
    """That tested it: n."""
    horizon: int
    """Queries to come that it speaks about: m; 0 for the source of all queries."""
    bound: float
    """Quality that it has with probability 1 - delta, tested alone; not below the target."""
    observed: float
    """Mean quality over the n."""
    tested: int
    """Hypotheses until the sequence ended, this one's path."""
    method: str
    """`population` or `next_queries`."""


def p_value(quality: FloatArray, target: float, horizon: int = 0) -> float:
    """Return the p-value of "the quality is below `target`" given each query's quality.

    quality: (n,), in [0, 1]. Raises InvalidRequest for judged answers with a horizon, for which
    none is known here.
    """
    count = len(quality)
    is_binary = bool(np.all((quality == 0.0) | (quality == 1.0)))
    if horizon:
        if not is_binary:
            raise InvalidRequest(
                "the next queries can be spoken about when each answer is right or wrong; judged "
                "answers take horizon 0",
                param="horizon",
            )
        right = int(quality.sum())
        needed = math.ceil(target * horizon - 1e-9)
        if needed <= 0:
            return 0.0
        total = count + horizon
        supposed = min(right + needed - 1, total)
        return float(stats.hypergeom.sf(right - 1, total, supposed, count))
    if is_binary:
        return float(stats.binom.sf(int(quality.sum()) - 1, count, target))
    return _hoeffding_bentkus(float(quality.mean()), count, target)


def _hoeffding_bentkus(mean: float, count: int, target: float) -> float:
    """Bound P(mean of n values in [0, 1] >= `mean`) when their expectation is `target`.

    arXiv 2101.02703, section 3.1, in terms of the loss 1 - quality.
    """
    loss, allowed = 1.0 - mean, 1.0 - target
    if loss >= allowed:
        return 1.0
    divergence = _term(loss, allowed) + _term(1.0 - loss, 1.0 - allowed)
    hoeffding = math.exp(-count * divergence)
    bentkus = math.e * float(stats.binom.cdf(math.ceil(count * loss), count, allowed))
    return min(hoeffding, bentkus, 1.0)


def _term(a: float, b: float) -> float:
    return a * math.log(a / b) if a > 0 else 0.0


def lower_bound(quality: FloatArray, delta: float, horizon: int = 0) -> float:
    """Return the highest target that these answers reject at level `delta`, 0 for none."""
    low, high = 0.0, 1.0
    for _ in range(_EXACT_TARGETS):
        middle = (low + high) / 2
        if p_value(quality, middle, horizon) <= delta:
            low = middle
        else:
            high = middle
    return low


def certify(
    path: Sequence[FloatArray], target: float, delta: float, horizon: int = 0
) -> tuple[int, Certificate]:
    """Return the last cascade of `path` that is accepted, by its place, and what is known of it.

    path: each cascade's quality per query, (n,), safest cascade first. Raises InvalidRequest for a
    senseless target or delta, and for a target that the data can't certify, with the one it could.
    """
    if not 0.0 < target < 1.0:
        raise InvalidRequest(f"target {target:g}: between 0 and 1", param="target")
    if not 0.0 < delta < 1.0:
        raise InvalidRequest(f"delta {delta:g}: between 0 and 1", param="delta")
    if not path:
        raise InvalidRequest("there is no cascade to certify", param="path")
    level = delta / len(path) if horizon else delta
    accepted, tested = -1, 0
    for place, quality in enumerate(path):
        tested += 1
        if p_value(quality, target, horizon) > level:
            break
        accepted = place
    if accepted < 0:
        best = lower_bound(path[0], level, horizon)
        raise InvalidRequest(
            f"{len(path[0])} queries can't certify a quality of {target:g} with delta {delta:g}: "
            f"the safest cascade has {path[0].mean():.4f} on them, and they certify {best:.4f} at "
            "most. Lower the target, allow a larger delta, or measure more queries",
            param="target",
        )
    quality = path[accepted]
    return accepted, Certificate(
        target=target,
        delta=delta,
        queries=len(quality),
        horizon=horizon,
        bound=lower_bound(quality, level, horizon),
        observed=float(quality.mean()),
        tested=tested,
        method="next_queries" if horizon else "population",
    )
