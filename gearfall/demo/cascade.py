"""Chooses and replays cascades over recorded answers: who answers, how well, at what cost."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gearfall.demo.certainty import Bools, Floats

CONFIDENCE_Z = 1.645
"""Standard errors below the mean of a one-sided 95 % bound (normal approximation)."""
CANDIDATES = 120
"""Thresholds tried for a stage: this many quantiles of its certainty."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one model did on n questions; every array has shape (n,)."""

    model: str
    certainty: Floats
    correct: Bools
    flops: Floats
    """Cost of each answer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a cascade does on a set of questions."""

    accuracy: float
    mean_flops: float
    """Mean cost of a question, counting every stage it visited."""
    shares: tuple[float, ...]
    """Share of the questions answered by each stage."""
    loss_bound: float
    """Accuracy lost against the reference, at most, by a one-sided 95 % bound on paired answers."""


def replay(records: Sequence[Record], thresholds: Sequence[float], reference: Record) -> Outcome:
    """Run a cascade: a stage answers if its certainty is at least its threshold, else the next.

    `thresholds` has one entry less than `records`: the last stage always answers. Accuracy is
    compared with that of `reference`.
    """
    waiting = np.ones_like(records[0].correct)
    correct = np.zeros_like(waiting)
    total_flops = 0.0
    shares = []
    for record, threshold in zip(records, (*thresholds, -math.inf), strict=True):
        total_flops += float(record.flops[waiting].sum())
        answers = waiting & (record.certainty >= threshold)
        correct |= answers & record.correct
        shares.append(float(answers.mean()))
        waiting = waiting & ~answers
    return Outcome(
        accuracy=float(correct.mean()),
        mean_flops=total_flops / correct.size,
        shares=tuple(shares),
        loss_bound=_loss_bound(correct, reference.correct),
    )


def choose_thresholds(
    records: Sequence[Record], reference: Record, *, tolerance: float
) -> tuple[float, ...] | None:
    """The cheapest thresholds that lose at most `tolerance` accuracy against `reference`.

    Decided by the loss bound, not by the plain difference, so that it carries over to other
    questions; the bound holds for one cascade at a time and not for the search as a whole. None if
    no candidate is good enough.
    """
    best: tuple[float, tuple[float, ...]] | None = None
    for thresholds in _candidates(records[:-1]):
        outcome = replay(records, thresholds, reference)
        if outcome.loss_bound <= tolerance and (best is None or outcome.mean_flops < best[0]):
            best = (outcome.mean_flops, thresholds)
    return None if best is None else best[1]


def _candidates(records: Sequence[Record]) -> Iterator[tuple[float, ...]]:
    levels = np.linspace(0.0, 1.0, CANDIDATES)
    grids = [np.unique(np.quantile(record.certainty, levels)).tolist() for record in records]
    return itertools.product(*grids)


def _loss_bound(correct: Bools, reference: Bools) -> float:
    """Upper bound on the mean of (reference - correct), of n paired answers."""
    losses = reference.astype(np.float64) - correct.astype(np.float64)
    error = float(losses.std(ddof=1)) / math.sqrt(losses.size)
    return float(losses.mean()) + CONFIDENCE_Z * error
