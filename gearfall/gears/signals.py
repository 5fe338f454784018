"""What could tell right answers from wrong ones, compared on queries that nothing was fitted on.

Each signal is a number in [0, 1] for each answer. How believable it is: `calibrate.Reliability`.
What it is worth: the cheapest cascade of the model and the best one, going up below a threshold of
that signal, that loses no more than LOSS to the best one, over the best one's cost. Thresholds are
chosen on the same queries for all signals alike: good for comparing them, not for a promise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from gearfall.core.certainty.calibration import Calibration, calibrated
from gearfall.core.certainty.certainty import measure_certainty
from gearfall.core.certainty.certainty_features import features_of
from gearfall.core.certainty.self_consistency import MIN_SAMPLES, SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.core.profile import Generation, Profile, ProfiledModel
from gearfall.gears.answers import FloatArray, ModelAnswers
from gearfall.gears.calibrate import LINE, Reliability, reliability
from gearfall.gears.counted_answers import counted_columns, known_answers
from gearfall.gears.profile_answers import fit_calibrations, learning
from gearfall.gears.search import front

LOSS = 0.01

Signal = Callable[[Sequence[float], Sequence[float]], float]
"""From log-probabilities and margins to a number in [0, 1]."""


@dataclass(frozen=True, slots=True)
class SignalReport:
    """One signal of one model."""

    signal: str
    reliability: Reliability
    cost_share: float | None
    """Of the best model's cost; None for the best model itself, and where no threshold will do."""


def _measure(name: str) -> Signal:
    return lambda logprobs, margins: measure_certainty(name, logprobs, margins)


def _feature(name: str, sign: float = 1.0) -> Signal:
    def signal(logprobs: Sequence[float], margins: Sequence[float]) -> float:
        return math.exp(sign * features_of((name,), logprobs, margins)[0])

    return signal


def _first_gap(logprobs: Sequence[float], margins: Sequence[float]) -> float:
    return measure_certainty("min_margin", logprobs[:1], margins[:1])


SIGNALS: Mapping[str, Signal] = MappingProxyType(
    {
        "first token": _feature("first"),
        "first token's gap": _first_gap,
        "least gap of two": _measure("min_margin"),
        "mean log-probability": _measure("mean_token_probability"),
        "quantile 0.1": _feature("q10"),
        "quantile 0.25": _feature("q25"),
        "median token": _feature("q50"),
        "least token": _measure("min_token_probability"),
        "mean entropy": _measure("entropy"),
        "largest entropy": _feature("max_entropy", -1.0),
        "whole answer": _measure("sequence_probability"),
    }
)
"""By name: the baselines of published cascades first, what needs no fitting."""


def compare_signals(
    profile: Profile, order: npt.NDArray[np.intp]
) -> dict[str, tuple[SignalReport, ...]]:
    """Return all signals that a profile knows of, by model.

    order: a random permutation of the queries; its first part fits, the rest compares. Models
    whose log-probabilities are not known, or that have one kind of answers only, are left out.
    Raises InvalidRequest when no model is left.
    """
    rows = order[len(learning(order)) :]
    fitted = fit_calibrations(profile, learning(order).tolist())
    quality = {model.name: _quality(model, rows) for model in profile.models}
    best = max(profile.models, key=lambda each: (float(quality[each.name].mean()), each.name))
    found = {}
    for model in profile.models:
        answers = [model.generations[at] for at in rows]
        if set(quality[model.name]) != {0.0, 1.0} or not all(each.logprobs for each in answers):
            continue
        seen = _signals(model, answers, fitted.get(model.name))
        last = (
            None
            if model is best
            else _columns(best, [best.generations[at] for at in rows], np.ones(len(rows)))
        )
        found[model.name] = tuple(
            SignalReport(
                name,
                reliability(columns.certainty, columns.correct),
                None if last is None else _cost_share(columns, last),
            )
            for name, columns in seen.items()
        )
    if not found:
        raise InvalidRequest(
            "no model of this profile has log-probabilities with both right and wrong answers: "
            "there is no signal to compare",
            param="profile",
        )
    return found


def _signals(
    model: ProfiledModel, answers: Sequence[Generation], calibration: Calibration | None
) -> dict[str, ModelAnswers]:
    """Return the planner's columns by each signal."""
    signals = dict(SIGNALS)
    if calibration is not None:
        plain = replace(calibration, knots=LINE)
        signals["logistic"] = lambda a, b: calibrated(plain, a, b)
        if calibration.knots != LINE:
            signals["logistic, isotonic"] = lambda a, b: calibrated(calibration, a, b)
    found = {
        name: _columns(
            model, answers, np.array([signal(each.logprobs, each.margins) for each in answers])
        )
        for name, signal in signals.items()
    }
    most = min(known_answers(each) for each in answers)
    for samples in range(MIN_SAMPLES, most + 1):
        columns = counted_columns(model.name, answers, SelfConsistency(samples))
        if set(columns.correct) == {0.0, 1.0}:
            found[f"equal ones of {samples} answers"] = columns
    return found


def _columns(
    model: ProfiledModel, answers: Sequence[Generation], certainty: FloatArray
) -> ModelAnswers:
    return ModelAnswers(
        ModelName(model.name),
        np.array([each.quality for each in answers]),
        certainty,
        np.array([each.cost for each in answers]),
    )


def _quality(model: ProfiledModel, rows: npt.NDArray[np.intp]) -> FloatArray:
    return np.array([model.generations[at].quality for at in rows])


def _cost_share(first: ModelAnswers, best: ModelAnswers) -> float | None:
    """Return the cheapest two-stage cascade's cost that loses no more than LOSS."""
    if first.cost.mean() >= best.cost.mean():
        return None
    floor = float(best.correct.mean()) - LOSS
    costs = [
        each.cost
        for each in front((first, best), max_stages=2)
        if each.stages[0].model == first.model and each.quality >= floor
    ]
    return min(costs) / float(best.cost.mean()) if costs else None
