"""All cascades of one to three stages and their thresholds, as a front of quality against cost.

A query goes up from a stage when its certainty is below the stage's threshold, as in the router.
Only the order of certainties matters, so that the thresholds to try are the certainties themselves:
n + 1 for two stages, all of them tried. Of three stages the last threshold is tried everywhere and
the first on a grid of quantiles, which is every certainty while there are no more than that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from gearfall.core.errors import InvalidRequest
from gearfall.core.records import AskedModel, Stage
from gearfall.gears.answers import FloatArray, ModelAnswers, check_answers

MAX_STAGES = 3
GRID = 512
"""First thresholds of three stages that are tried."""


@dataclass(frozen=True, slots=True)
class Cascade:
    """Stages with thresholds, and what they came to on the queries."""

    stages: tuple[Stage, ...]
    quality: float
    """Mean over the queries, in [0, 1]."""
    cost: float
    """Mean over the queries, all stages that ran."""
    reached: tuple[float, ...]
    """Share of the queries that came to each stage; 1 for the first."""


@dataclass(frozen=True, slots=True, eq=False)
class _Points:
    """Many settings of one cascade's thresholds; one number a setting."""

    models: tuple[AskedModel, ...]
    thresholds: npt.NDArray[np.float64]
    """(settings, stages - 1)."""
    quality: FloatArray
    cost: FloatArray

    def take(self, rows: npt.NDArray[np.intp]) -> "_Points":
        return _Points(self.models, self.thresholds[rows], self.quality[rows], self.cost[rows])


def front(
    models: Sequence[ModelAnswers], *, max_stages: int = MAX_STAGES, grid: int = GRID
) -> tuple[Cascade, ...]:
    """Return the cascades that no other one beats in both cost and quality, cheapest first.

    Raises InvalidRequest as `check_answers`, or for a number of stages beyond 1 to 3.
    """
    if not 1 <= max_stages <= MAX_STAGES:
        raise InvalidRequest(f"{max_stages} stages: 1 to {MAX_STAGES}", param="max_stages")
    ordered = check_answers(models)
    by_name = {each.asked: each for each in ordered}
    kept = [_pruned(points) for points in _all_points(ordered, max_stages, grid)]
    cost = np.concatenate([points.cost for points in kept])
    quality = np.concatenate([points.quality for points in kept])
    owner = np.concatenate([np.full(len(p.cost), at) for at, p in enumerate(kept)])
    start = np.cumsum([0, *(len(points.cost) for points in kept)])
    cascades = []
    for row in _undominated(cost, quality):
        points = kept[owner[row]]
        thresholds = points.thresholds[row - start[owner[row]]]
        chosen = [by_name[name] for name in points.models]
        cascades.append(evaluate(chosen, tuple(map(float, thresholds))))
    return tuple(cascades)


def evaluate(models: Sequence[ModelAnswers], thresholds: Sequence[float]) -> Cascade:
    """Replay one cascade: `models` in order of its stages, one threshold fewer than models."""
    assert len(thresholds) == len(models) - 1, (len(thresholds), len(models))
    cost, quality, reached = replay(models, thresholds)
    limits = (*thresholds, None)
    stages = tuple(Stage(m.model, t, m.several) for m, t in zip(models, limits, strict=True))
    return Cascade(stages, float(quality.mean()), float(cost.mean()), reached)


def replay(
    models: Sequence[ModelAnswers], thresholds: Sequence[float]
) -> tuple[FloatArray, FloatArray, tuple[float, ...]]:
    """Return cost and quality of each query, and the share that reached each stage."""
    there = np.ones(models[0].count, dtype=bool)
    cost, quality = np.zeros(models[0].count), np.zeros(models[0].count)
    reached = []
    for model, threshold in zip(models, (*thresholds, -np.inf), strict=True):
        reached.append(float(there.mean()))
        goes_up = there & (model.certainty < threshold)
        stays = there & ~goes_up
        cost[stays] += model.cost[stays]
        cost[goes_up] += model.spent_up[goes_up]
        quality[stays] = model.correct[stays]
        there = goes_up
    return cost, quality, tuple(reached)


def _all_points(models: Sequence[ModelAnswers], max_stages: int, grid: int) -> Iterator[_Points]:
    """Yield every cascade whose stages' mean costs rise: a stage that is dearer comes later.

    A model stands in it once, however it is asked, and the last one is asked once.
    """
    for each in models:
        if each.several:
            continue
        none = np.zeros((1, 0))
        yield _Points((each.asked,), none, each.correct.mean()[None], each.cost.mean()[None])
    if max_stages >= 2:
        for pair in filter(_is_cascade, combinations(models, 2)):
            yield _two_stages(*pair)
    if max_stages >= 3:
        for triple in filter(_is_cascade, combinations(models, 3)):
            yield _three_stages(*triple, grid)


def _is_cascade(models: Sequence[ModelAnswers]) -> bool:
    return not models[-1].several and len({each.model for each in models}) == len(models)


def _two_stages(first: ModelAnswers, last: ModelAnswers) -> _Points:
    order = np.argsort(first.certainty, kind="stable")
    breaks = _breaks(first.certainty[order])
    gained = _before(last.correct[order] - first.correct[order])[breaks]
    spent = _before((first.spent_up - first.cost + last.cost)[order])[breaks]
    return _Points(
        (first.asked, last.asked),
        first.certainty[order][breaks][:, None],
        (first.correct.sum() + gained) / first.count,
        (first.cost.sum() + spent) / first.count,
    )


def _three_stages(
    first: ModelAnswers, middle: ModelAnswers, last: ModelAnswers, grid: int
) -> _Points:
    """Try each first threshold of the grid with every second one."""
    order = np.argsort(middle.certainty, kind="stable")
    certainty = middle.certainty[order]
    breaks = _breaks(certainty)
    gained = last.correct[order] - middle.correct[order]
    spent = (middle.spent_up - middle.cost + last.cost)[order]
    names = (first.asked, middle.asked, last.asked)
    found = []
    for threshold in _grid_of(first.certainty, grid):
        goes_up = first.certainty < threshold
        among = goes_up[order]
        quality = first.correct.sum() + (middle.correct - first.correct)[goes_up].sum()
        cost = first.cost.sum() + (first.spent_up - first.cost + middle.cost)[goes_up].sum()
        thresholds = np.stack([np.full(len(breaks), threshold), certainty[breaks]], axis=1)
        points = _Points(
            names,
            thresholds,
            (quality + _before(np.where(among, gained, 0.0))[breaks]) / first.count,
            (cost + _before(np.where(among, spent, 0.0))[breaks]) / first.count,
        )
        found.append(_pruned(points))
    return _Points(
        names,
        np.concatenate([points.thresholds for points in found]),
        np.concatenate([points.quality for points in found]),
        np.concatenate([points.cost for points in found]),
    )


def _breaks(ordered: FloatArray) -> npt.NDArray[np.intp]:
    """Return where a value differs from the one before; the first is nobody's going up."""
    return np.flatnonzero(np.diff(ordered, prepend=-np.inf) > 0)


def _before(values: FloatArray) -> FloatArray:
    """Return the sum of all values before each."""
    return np.cumsum(values) - values


def _grid_of(certainty: FloatArray, grid: int) -> FloatArray:
    distinct = np.unique(certainty)
    if len(distinct) <= grid:
        return distinct
    return distinct[np.linspace(0, len(distinct) - 1, grid).astype(np.intp)]


def _pruned(points: _Points) -> _Points:
    return points.take(_undominated(points.cost, points.quality))


def _undominated(cost: FloatArray, quality: FloatArray) -> npt.NDArray[np.intp]:
    """Return the rows that none beats, by rising cost; of equals the first."""
    order = np.lexsort((-quality, cost))
    best_before = np.maximum.accumulate(np.concatenate([[-np.inf], quality[order][:-1]]))
    kept: npt.NDArray[np.intp] = order[quality[order] > best_before]
    return kept
