"""Calibrations by which hopeless drafts can be stopped, where that costs nothing."""

import numpy as np
import pytest

from gearfall.core.certainty.calibration import calibrated
from gearfall.core.certainty.certainty_bounds import bound_of
from gearfall.core.certainty.certainty_features import USUAL_FEATURES
from gearfall.core.errors import InvalidRequest
from gearfall.gears.stoppable import FALLING_FEATURES, fit_stoppable


def generations(count: int, seed: int, chance_of):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 30, count)
    logprobs = [-random.exponential(random.choice([0.02, 0.4]), n) for n in lengths]
    margins = [random.exponential(2.0, n) for n in lengths]
    chance = np.array([chance_of(each) for each in logprobs])
    right = (random.random(count) < chance).astype(float)
    return [list(each) for each in logprobs], [list(each) for each in margins], right


def by_worst(logprobs):
    return 1 / (1 + np.exp(-(3 + 3 * logprobs.min())))


def by_length(logprobs):
    """Longer answers are right: what only falls says the opposite."""
    return float(len(logprobs) > 15)


def test_falling_features_are_taken_where_they_say_as_much():
    fitted = fit_stoppable(*generations(1500, 1, by_worst))
    assert fitted.features
    assert set(fitted.features) <= set(FALLING_FEATURES)
    assert min(fitted.weights) > 0


def test_the_usual_ones_are_kept_where_they_say_more():
    assert fit_stoppable(*generations(1500, 2, by_length)).features == USUAL_FEATURES


def test_a_rejected_draft_is_known_as_soon_as_it_is_one():
    """However many tokens may follow: the bound is the certainty of what is there."""
    logprobs, margins, right = generations(1500, 3, by_worst)
    fitted = fit_stoppable(logprobs, margins, right)
    for answer, leads in zip(logprobs[:50], margins[:50], strict=True):
        bound = bound_of("", fitted)
        for count, (logprob, margin) in enumerate(zip(answer, leads, strict=True), start=1):
            bound.add(logprob, margin)
            now = calibrated(fitted, answer[:count], leads[:count])
            assert bound.most(1000) == pytest.approx(now, abs=1e-6)


def test_it_refuses_what_can_not_be_fitted():
    logprobs, margins, right = generations(40, 4, by_worst)
    with pytest.raises(InvalidRequest, match="at least 5 right and 5"):
        fit_stoppable(logprobs, margins, np.ones_like(right))
