"""From logits to tokens: greedy or seeded sampling, log-probabilities, margins and alternatives.

The draw for token i of a job uses Philox4x64 with key = seed and counter = i, and the inverse of
the cumulative distribution over tokens sorted by falling probability. So a token depends on its
logits, its seed and its index alone: not on the batch, nor on what was drawn before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearfall.core.job import TokenAlternative
from gearfall.core.sampling import SamplingParams

Logits = NDArray[np.float32]

MAX_MARGIN = 1e4
"""Margin of a token without a rival, in nats: no two logits that matter lie further apart."""


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
    assert logits.shape[0] == len(draws)
    rows = np.arange(len(draws))
    best = logits.argmax(axis=1)
    top = logits[rows, best]
    with np.errstate(invalid="ignore"):
        log_total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    second = _second_best(logits, rows, best)
    is_sound = np.isfinite(log_total)
    return [
        _sample_row(logits[row], draws[row], int(best[row]), log_total[row], second[row])
        if is_sound[row]
        else None
        for row in range(len(draws))
    ]


def uniform(seed: int, index: int) -> float:
    """Return the number in [0, 1) for token `index`: the top 53 bits of the first Philox word."""
    word = int(np.random.Philox(key=seed, counter=index).random_raw())
    return (word >> 11) * 2.0**-53


def choose(logits: Logits, sampling: SamplingParams, number: float) -> int:
    """Return the token that `number` in [0, 1) selects from one row under `sampling`."""
    order = _rank(logits, sampling.top_k)
    ranked = logits[order].astype(np.float64)
    mass = np.cumsum(np.exp((ranked - ranked[0]) / sampling.temperature))
    kept = len(mass)
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(mass, sampling.top_p * mass[-1], side="left")) + 1
    kept = min(kept, len(mass))
    place = int(np.searchsorted(mass[:kept], number * mass[kept - 1], side="right"))
    return int(order[min(place, kept - 1)])


def _sample_row(
    logits: Logits, draw: Draw, best: int, log_total: np.float32, second: np.float32
) -> Sampled:
    sampling = draw.sampling
    token = best
    if not sampling.is_greedy:
        token = choose(logits, sampling, uniform(sampling.seed, draw.index))
    alternatives: tuple[TokenAlternative, ...] = ()
    if sampling.top_logprobs:
        alternatives = tuple(
            TokenAlternative(int(other), float(logits[other] - log_total))
            for other in _rank(logits, sampling.top_logprobs)
        )
    margin = min(float(logits[best] - second), MAX_MARGIN)
    return Sampled(token, float(logits[token] - log_total), margin, alternatives)


def _second_best(logits: Logits, rows: NDArray[np.intp], best: NDArray[np.intp]) -> Logits:
    """Largest logit of each row without the best token; minus infinity if there is no other."""
    kept = logits[rows, best].copy()
    logits[rows, best] = -np.inf
    second: Logits = logits.max(axis=1)
    logits[rows, best] = kept
    return second


def _rank(logits: Logits, limit: int) -> NDArray[np.intp]:
    """Tokens by falling logit, the lower id first among equals; at most `limit`, 0 for all."""
    if not 0 < limit < len(logits):
        return np.argsort(-logits, kind="stable")
    threshold = np.partition(logits, len(logits) - limit)[len(logits) - limit]
    candidates = np.flatnonzero(logits >= threshold)
    order = np.argsort(-logits[candidates], kind="stable")[:limit]
    return candidates[order]
