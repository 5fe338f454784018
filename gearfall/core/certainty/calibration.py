"""A small fitted model from the features of a generation to the probability that it is right.

Logistic regression over standardised features, then a monotone curve through knots (isotonic
regression) that makes its probabilities honest. Fitted offline (`gearfall.gears.calibrate`), stored
with the gear plan, applied here in plain Python.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gearfall.core.certainty.certainty_features import FEATURES, features_of
from gearfall.core.errors import InvalidRequest

MAX_KNOTS = 256


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that applying needs; one number a feature in `means`, `scales` and `weights`."""

    features: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    """Above 0."""
    weights: tuple[float, ...]
    bias: float
    knots: tuple[tuple[float, float], ...]
    """(probability by the regression, probability), both rising; between them linearly."""
    queries: int = 0
    """That it was fitted on."""


def calibrated(
    calibration: Calibration, logprobs: Sequence[float], margins: Sequence[float]
) -> float:
    """Return the probability that the answer is right, in [0, 1]."""
    values = features_of(calibration.features, logprobs, margins)
    terms = zip(values, calibration.means, calibration.scales, calibration.weights, strict=True)
    score = calibration.bias + math.fsum((v - mean) / scale * w for v, mean, scale, w in terms)
    return probability_of_score(calibration, score)


def probability_of_score(calibration: Calibration, score: float) -> float:
    """Return what the regression's score means; never falls when the score rises."""
    return _on_curve(calibration.knots, _logistic(score))


def check_calibration(calibration: Calibration, where: str) -> None:
    """Raise InvalidRequest, naming `where`, for one that could not be applied."""
    count = len(calibration.features)
    unknown = [name for name in calibration.features if name not in FEATURES]
    if unknown or not count or len(set(calibration.features)) != count:
        known = ", ".join(FEATURES)
        raise InvalidRequest(
            f"{where}: features {list(calibration.features)}; one or more of {known}, each once",
            param=where,
        )
    for name in ("means", "scales", "weights"):
        values = getattr(calibration, name)
        if len(values) != count or not all(map(math.isfinite, values)):
            raise InvalidRequest(
                f"{where}: {name} must hold {count} finite numbers, one a feature", param=where
            )
    if not all(scale > 0 for scale in calibration.scales) or not math.isfinite(calibration.bias):
        raise InvalidRequest(f"{where}: scales above 0 and a finite bias", param=where)
    _check_knots(calibration.knots, where)


def _check_knots(knots: Sequence[tuple[float, float]], where: str) -> None:
    if not 1 <= len(knots) <= MAX_KNOTS:
        raise InvalidRequest(f"{where}: {len(knots)} knots; 1 to {MAX_KNOTS}", param=where)
    if not all(0.0 <= each <= 1.0 for knot in knots for each in knot):
        raise InvalidRequest(f"{where}: knots must lie in 0 to 1", param=where)
    if any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(knots)):
        raise InvalidRequest(f"{where}: knots must rise", param=where)


def _logistic(score: float) -> float:
    if score >= 0:
        return 1.0 / (1.0 + math.exp(-min(score, 700.0)))
    odds = math.exp(max(score, -700.0))
    return odds / (1.0 + odds)


def _on_curve(knots: Sequence[tuple[float, float]], x: float) -> float:
    at = bisect_right(knots, (x, math.inf))
    if at == 0:
        return knots[0][1]
    if at == len(knots):
        return knots[-1][1]
    (x0, y0), (x1, y1) = knots[at - 1], knots[at]
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)
