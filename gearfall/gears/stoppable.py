"""Chooses what a calibration looks at: by some features hopeless drafts can be stopped early.

The least log-probability, their sum and the least margin only fall while an answer grows. Where all
weights on them are positive, so does the calibrated certainty, and a draft below its threshold is
known to be rejected at that token (`core/certainty/certainty_bounds.py`). Means and quantiles can
rise again with every token that may follow: by them nearly every draft runs to its end. So these
three are taken unless the usual features tell right from wrong clearly better.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gearfall.core.certainty.calibration import Calibration
from gearfall.core.certainty.certainty_features import USUAL_FEATURES, features_of
from gearfall.gears.answers import FloatArray
from gearfall.gears.calibrate import FOLDS, fit_calibration

FALLING_FEATURES = ("min", "sum", "min_margin")


def fit_stoppable(
    logprobs: Sequence[Sequence[float]], margins: Sequence[Sequence[float]], right: FloatArray
) -> Calibration:
    """Return the calibration on falling features, or the usual one where that is clearly better.

    Clearly: its squared errors on queries that it did not see are smaller by more than the standard
    error of the difference. right: (n,). Raises InvalidRequest as `fit_calibration` does.
    """
    usual = fit_calibration(logprobs, margins, right)
    falling = _fit_falling(logprobs, margins, right)
    if falling is None:
        return usual
    gained = _squared_errors(falling.features, logprobs, margins, right) - _squared_errors(
        USUAL_FEATURES, logprobs, margins, right
    )
    is_clear = gained.mean() > gained.std(ddof=1) / np.sqrt(len(gained))
    return usual if is_clear else falling


def _fit_falling(
    logprobs: Sequence[Sequence[float]], margins: Sequence[Sequence[float]], right: FloatArray
) -> Calibration | None:
    """Return the calibration on as many of them as have positive weights together, if any."""
    names: tuple[str, ...] = FALLING_FEATURES
    while names:
        fitted = fit_calibration(logprobs, margins, right, features=names)
        if min(fitted.weights) > 0:
            return fitted
        worst = fitted.features[int(np.argmin(fitted.weights))]
        names = tuple(name for name in names if name != worst)
    return None


def _squared_errors(
    names: Sequence[str],
    logprobs: Sequence[Sequence[float]],
    margins: Sequence[Sequence[float]],
    right: FloatArray,
) -> FloatArray:
    """Return each query's, of a regression that did not see it."""
    raw = np.array(
        [features_of(names, each, leads) for each, leads in zip(logprobs, margins, strict=True)]
    )
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=1.0, max_iter=1000, solver="newton-cholesky")
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    unseen = cross_val_predict(model, raw, right, cv=folds, method="predict_proba")[:, 1]
    return np.asarray((unseen - right) ** 2, dtype=np.float64)
