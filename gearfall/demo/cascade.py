"""Chooses and replays cascades over recorded answers: who answers, how well, at what cost."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from gearfall.demo.certainty import Bools, Floats

RISK = 0.05
"""Chance, at most, that a chosen cascade loses more than was tolerated."""
CANDIDATES = 40
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
    mean_loss: float
    """Accuracy lost against the reference on the same questions; negative if some was gained."""
    loss_error: float
    """Standard error of the mean loss."""

    def loss_bound(self, deviations: float) -> float:
        """The loss that is not exceeded, `deviations` standard errors above the mean loss."""
        return self.mean_loss + deviations * self.loss_error


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
    losses = reference.correct.astype(np.float64) - correct.astype(np.float64)
    # One lost answer at least: that none was lost in n does not mean that none ever is.
    deviation = max(float(losses.std()), 1 / math.sqrt(losses.size))
    return Outcome(
        accuracy=float(correct.mean()),
        mean_flops=total_flops / correct.size,
        shares=tuple(shares),
        mean_loss=float(losses.mean()),
        loss_error=deviation / math.sqrt(losses.size),
    )


def choose_thresholds(
    records: Sequence[Record], reference: Record, *, tolerance: float
) -> tuple[float, ...] | None:
    """The cheapest thresholds that lose at most `tolerance` accuracy against `reference`.

    Decided by a bound on the loss, not by the loss measured here, so that it carries over to other
    questions of the same kind. The bound holds for all candidates at once (Bonferroni, normal
    approximation): choosing the cheapest among many would otherwise favour the lucky ones. None if
    no candidate is good enough.
    """
    candidates = list(_candidates(records[:-1]))
    deviations = NormalDist().inv_cdf(1 - RISK / len(candidates))
    best: tuple[float, tuple[float, ...]] | None = None
    for thresholds in candidates:
        outcome = replay(records, thresholds, reference)
        is_certified = outcome.loss_bound(deviations) <= tolerance
        if is_certified and (best is None or outcome.mean_flops < best[0]):
            best = (outcome.mean_flops, thresholds)
    return None if best is None else best[1]


def _candidates(records: Sequence[Record]) -> Iterator[tuple[float, ...]]:
    levels = np.linspace(0.0, 1.0, CANDIDATES)
    grids = [np.unique(np.quantile(record.certainty, levels)).tolist() for record in records]
    return itertools.product(*grids)
