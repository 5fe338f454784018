"""The cheapest cascade that certifiably keeps a quality target.

Learned on some queries, tested on the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gearfall.core.records import AskedModel
from gearfall.gears.answers import FloatArray, ModelAnswers, check_answers
from gearfall.gears.certificate import Certificate, certify
from gearfall.gears.search import GRID, MAX_STAGES, Cascade, front, replay

LEARN_SHARE = 0.3
"""Of the queries, those that say which cascades are worth testing and in which order."""
MAX_PATH = 16
"""Cascades that are tested one after the other at the same level."""
MAX_PATH_AHEAD = 5
"""The same where each test gets its own share of delta."""
SLACK = 0.03
"""Cascades that fell short of the target by more than this while learning are not worth a test."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One cascade with its certificate; its figures are over the testing queries."""

    cascade: Cascade
    certificate: Certificate


def choose(
    models: Sequence[ModelAnswers],
    target: float,
    *,
    delta: float,
    order: npt.NDArray[np.intp],
    horizon: int = 0,
    max_stages: int = MAX_STAGES,
    grid: int = GRID,
) -> Choice:
    """Return the cheapest certified cascade.

    order: a random permutation of the queries, the caller's: its first LEARN_SHARE learn. Raises
    InvalidRequest as `front` and `certify`.
    """
    models = check_answers(models)
    learning = int(len(order) * LEARN_SHARE)
    learn = [each.take(order[:learning]) for each in models]
    test = [each.take(order[learning:]) for each in models]
    learned = front(learn, max_stages=max_stages, grid=grid)
    hopeful = [each for each in learned if each.quality >= target - SLACK]
    path = thinned(hopeful or learned[-1:], MAX_PATH_AHEAD if horizon else MAX_PATH)
    by_name = {each.asked: each for each in test}
    replays = [_replayed(by_name, cascade) for cascade in path]
    accepted, certificate = certify([q for _, q, _ in replays], target, delta, horizon)
    cost, quality, reached = replays[accepted]
    return Choice(
        Cascade(path[accepted].stages, float(quality.mean()), float(cost.mean()), reached),
        certificate,
    )


def _replayed(
    models: Mapping[AskedModel, ModelAnswers], cascade: Cascade
) -> tuple[FloatArray, FloatArray, tuple[float, ...]]:
    chosen = [models[stage.asked] for stage in cascade.stages]
    return replay(chosen, [s.threshold for s in cascade.stages if s.threshold is not None])


def thinned(cascades: Sequence[Cascade], most: int) -> tuple[Cascade, ...]:
    """Return at most so many cascades from the best quality to the cheapest, evenly by cost."""
    falling = tuple(reversed(cascades))
    if len(falling) <= most:
        return falling
    return spread(falling, np.array([each.cost for each in falling]), most)


def spread(cascades: Sequence[Cascade], places: FloatArray, most: int) -> tuple[Cascade, ...]:
    """Return at most so many of the cascades, in their order, evenly over where they are placed."""
    wanted = np.linspace(places[0], places[-1], min(most, len(cascades)))
    nearest = sorted({int(np.abs(places - place).argmin()) for place in wanted})
    return tuple(cascades[at] for at in nearest)
