"""What each model answered to the same queries: right or not, how certain, at what cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.core.records import AskedModel

FloatArray = npt.NDArray[np.float64]
MIN_QUERIES = 20
"""Fewer say nothing that a plan could stand on."""
MAX_QUERIES = 10_000_000


@dataclass(frozen=True, slots=True, eq=False)
class ModelAnswers:
    """One model over the queries; the arrays have one number a query, in the same order for all."""

    model: ModelName
    correct: FloatArray
    """Quality of each answer in [0, 1]: 1 right, 0 wrong, between for judged ones."""
    certainty: FloatArray
    """In [0, 1], as the router would measure it."""
    cost: FloatArray
    """Of computing each answer, prompt included; any one unit for all models, above 0."""
    several: SelfConsistency | None = None
    """Where the model is asked several times: how. All arrays are then about that."""
    cost_up: FloatArray | None = None
    """What is spent on each answer if it goes up; None: `cost`. Above 0 and at most `cost`."""

    @property
    def asked(self) -> AskedModel:
        """As `Stage.asked`."""
        return self.model, self.several

    @property
    def spent_up(self) -> FloatArray:
        """Spent on each answer if it goes up."""
        return self.cost if self.cost_up is None else self.cost_up

    @property
    def count(self) -> int:
        """Queries."""
        return len(self.correct)

    def take(self, rows: npt.NDArray[np.intp]) -> "ModelAnswers":
        """Return the answers to some of the queries."""
        return replace(
            self,
            correct=self.correct[rows],
            certainty=self.certainty[rows],
            cost=self.cost[rows],
            cost_up=None if self.cost_up is None else self.cost_up[rows],
        )


def check_answers(models: Sequence[ModelAnswers]) -> tuple[ModelAnswers, ...]:
    """Return the models with cheapest first. Raises InvalidRequest saying what to change."""
    if not models:
        raise InvalidRequest("there are no answers of any model", param="models")
    asked = [each.asked for each in models]
    if len(set(asked)) != len(asked):
        twice = sorted({each[0] for each in asked if asked.count(each) > 1})
        raise InvalidRequest(f"answers of {', '.join(twice)} are there twice", param="models")
    for each in models:
        _check_one(each, models[0].count)
    if len(models) > 1:
        _check_classes(models)
    return tuple(sorted(models, key=_by_cost))


def _by_cost(answers: ModelAnswers) -> tuple[float, str, int]:
    samples = answers.several.samples if answers.several else 1
    return float(answers.cost.mean()), answers.model, samples


def _check_one(answers: ModelAnswers, count: int) -> None:
    name = answers.model
    for field, low, high in (("correct", 0.0, 1.0), ("certainty", 0.0, 1.0), ("cost", 0.0, np.inf)):
        column: FloatArray = getattr(answers, field)
        if column.ndim != 1 or len(column) != count:
            raise InvalidRequest(
                f"{name}: {len(column)} values of {field} for {count} queries; every model needs "
                "one for each query",
                param=field,
            )
        broken = np.flatnonzero(~np.isfinite(column))
        if len(broken):
            raise InvalidRequest(
                f"{name}: {field} of query {broken[0]} is {column[broken[0]]}; it must be a finite "
                f"number ({len(broken)} such)",
                param=field,
            )
        outside = np.flatnonzero((column < low) | (column > high))
        if len(outside):
            shown: Any = column[outside[0]]
            raise InvalidRequest(
                f"{name}: {field} of query {outside[0]} is {shown:g}; it must lie in "
                f"{low:g} to {high:g} ({len(outside)} such)",
                param=field,
            )
    if not MIN_QUERIES <= count <= MAX_QUERIES:
        raise InvalidRequest(
            f"{count} queries; a plan needs at least {MIN_QUERIES} and takes at most "
            f"{MAX_QUERIES:,}",
            param="queries",
        )
    if not np.all((answers.spent_up > 0) & (answers.spent_up <= answers.cost)):
        raise InvalidRequest(f"{name}: an answer that costs nothing", param="cost")


def _check_classes(models: Sequence[ModelAnswers]) -> None:
    """Refuse answers from which no cascade can be told from another."""
    if all(np.all(each.correct == each.correct[0]) for each in models):
        raise InvalidRequest(
            "every model has the same quality on every query: with one class only there is "
            "nothing to choose between; add queries that some model gets wrong and some gets right",
            param="correct",
        )
