"""From logits to tokens: greedy or seeded sampling, log-probabilities, margins and alternatives.

The draw for token i of a job uses Philox4x64 with key = seed and counter = i, and the inverse of
the cumulative distribution over tokens sorted by falling probability. So a token depends on its
logits, its seed and its index alone: not on the batch, nor on what was drawn before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearfall.core.generation.job import TokenAlternative
from gearfall.core.generation.sampling import SamplingParams
from gearfall.infra.kernels.cpu_logits import summarize

Logits = NDArray[np.float32]

MAX_MARGIN = 1e4
"""Margin of a token without a rival, in nats: no two logits that matter lie further apart."""

_DEPTHS = (6.0, 16.0, math.inf)
"""How far below the likeliest token others are ranked with it, in nats: what is further down is
seldom needed and costs sorting the vocabulary."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What to draw for one row of logits."""

    sampling: SamplingParams
    index: int
    """Index of the token in its answer, from 0."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token; log-probabilities are of the unmodified distribution."""

    token_id: int
    logprob: float
    margin: float
    """logprob(top 1) - logprob(top 2), at most MAX_MARGIN."""
    alternatives: tuple[TokenAlternative, ...]


def sample_rows(logits: Logits, draws: Sequence[Draw]) -> list[Sampled | None]:
    """Choose one token for each row of `logits` [rows, vocabulary].

    None for a row whose logits are not all numbers (minus infinity is one): nothing can be drawn.
    """
    rows = Rows(logits, [draw.sampling for draw in draws])
    return [rows.sample(row, draw.index) for row, draw in enumerate(draws)]


class Rows:
    """Rows of logits [rows, vocabulary] from which tokens are chosen, each row for itself."""

    def __init__(self, logits: Logits, samplings: Sequence[SamplingParams]) -> None:
        """`samplings`: one for each row."""
        assert logits.shape[0] == len(samplings)
        self._logits = logits
        self._samplings = samplings
        sharpness = np.array([_sharpness(sampling) for sampling in samplings], dtype=np.float32)
        found = summarize(logits, sharpness)
        with np.errstate(invalid="ignore"):
            self._margins = np.minimum(found.largest - found.second, MAX_MARGIN).tolist()
            self._log_totals = np.log(found.total) + found.largest
        self._best = found.best.tolist()
        self._totals = found.sharpened_total.tolist()

    def sample(self, row: int, index: int) -> Sampled | None:
        """Choose the token with this index in its answer; None as with `sample_rows`."""
        if self._best[row] < 0:
            return None
        return _sample_row(
            self._logits[row],
            Draw(self._samplings[row], index),
            self._best[row],
            self._log_totals[row],
            margin=self._margins[row],
            total=self._totals[row],
        )


def uniform(seed: int, index: int) -> float:
    """Return the number in [0, 1) for token `index`: the top 53 bits of the first Philox word."""
    word = int(np.random.Philox(key=seed, counter=index).random_raw())
    return (word >> 11) * 2.0**-53


def choose(logits: Logits, sampling: SamplingParams, number: float, total: float) -> int:
    """Return the token that `number` in [0, 1) selects from one row under `sampling`.

    `total`: sum of exp((logit - largest) / temperature) over the row. Only as many of the likeliest
    tokens are ranked as the choice needs; how many that is changes nothing in it.
    """
    largest = logits.max()
    for depth in _DEPTHS:
        is_all = depth == _DEPTHS[-1]
        order = _leading(logits, largest - depth * sampling.temperature)
        if sampling.top_k:
            if not is_all and len(order) < sampling.top_k:
                continue
            order, is_all = order[: sampling.top_k], True
        mass = np.cumsum(
            np.exp((logits[order].astype(np.float64) - largest) / sampling.temperature)
        )
        whole = float(mass[-1]) if sampling.top_k else total
        is_cut = sampling.top_p < 1.0
        reach = (sampling.top_p if is_cut else number) * whole
        if is_all or mass[-1] > reach:
            break
    kept = len(mass)
    if is_cut:
        kept = min(int(np.searchsorted(mass, reach, side="left")) + 1, kept)
    sought = number * mass[kept - 1] if is_cut else reach
    place = int(np.searchsorted(mass[:kept], sought, side="right"))
    return int(order[min(place, kept - 1)])


def _sharpness(sampling: SamplingParams) -> float:
    return 1.0 if sampling.is_greedy else 1.0 / sampling.temperature


def _sample_row(
    logits: Logits, draw: Draw, best: int, log_total: np.float32, *, margin: float, total: float
) -> Sampled:
    sampling = draw.sampling
    token = best
    if not sampling.is_greedy:
        token = choose(logits, sampling, uniform(sampling.seed, draw.index), total)
    alternatives: tuple[TokenAlternative, ...] = ()
    if sampling.top_logprobs:
        alternatives = tuple(
            TokenAlternative(int(other), float(logits[other] - log_total))
            for other in _rank(logits, sampling.top_logprobs)
        )
    return Sampled(token, float(logits[token] - log_total), margin, alternatives)


def _rank(logits: Logits, limit: int) -> NDArray[np.intp]:
    """Return the `limit` likeliest tokens, fewer where there are not so many."""
    largest = logits.max()
    for depth in _DEPTHS:
        order = _leading(logits, largest - depth)
        if len(order) >= limit:
            break
    return order[:limit]


def _leading(logits: Logits, floor: float) -> NDArray[np.intp]:
    """Tokens whose logit is not below `floor`, by falling logit, the lower id first of equals."""
    candidates = np.flatnonzero(logits >= floor)
    return candidates[np.argsort(-logits[candidates], kind="stable")]
