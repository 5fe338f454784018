import numpy as np
import pytest

from gearfall.core.certainty.calibration import calibrated, check_calibration
from gearfall.core.errors import InvalidRequest
from gearfall.gears.calibrate import CURVE_FROM, LINE, fit_calibration, reliability


def generations(count: int, seed: int):
    """Answers of 1 to 8 tokens, right with a probability that falls with their worst token."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, count)
    logprobs = [-random.exponential(random.choice([0.05, 1.0]), n) for n in lengths]
    margins = [random.exponential(2.0, n) for n in lengths]
    chance = np.array([1 / (1 + np.exp(-(3 + 3 * each.min()))) for each in logprobs])
    right = (random.random(count) < chance).astype(float)
    return [list(each) for each in logprobs], [list(each) for each in margins], right


def certainties(calibration, logprobs, margins):
    rows = zip(logprobs, margins, strict=True)
    return np.array([calibrated(calibration, each, leads) for each, leads in rows])


def test_it_is_believable_on_answers_it_never_saw():
    fitted = fit_calibration(*generations(4000, seed=1))
    check_calibration(fitted, "fitted")
    logprobs, margins, right = generations(4000, seed=2)
    found = reliability(certainties(fitted, logprobs, margins), right)
    raw = np.array([np.exp(sum(each)) for each in logprobs])
    plain = reliability(raw, right)
    assert found.ece < 0.04 < plain.ece
    assert found.auroc >= plain.auroc
    assert found.brier < plain.brier


def test_few_answers_bend_nothing():
    """Steps of a curve through few answers would tell fewer of them apart."""
    logprobs, margins, right = generations(CURVE_FROM, seed=4)
    bent = fit_calibration(logprobs, margins, right)
    few = CURVE_FROM - 1
    straight = fit_calibration(logprobs[:few], margins[:few], right[:few])
    assert straight.knots == LINE
    assert len(bent.knots) > 5
    logprobs, margins, right = generations(3000, seed=5)
    values = certainties(straight, logprobs, margins)
    assert np.all(np.diff(np.sort(values)) > 0.0)
    assert reliability(values, right).ece < 0.06


def test_reliability_by_hand():
    certainty = np.array([0.1, 0.2, 0.8, 0.9])
    right = np.array([0.0, 1.0, 1.0, 1.0])
    found = reliability(certainty, right, bins=2)
    assert [mean for mean, _, _ in found.bins] == pytest.approx([0.15, 0.85])
    assert [row[1:] for row in found.bins] == [(0.5, 2), (1.0, 2)]
    assert found.ece == pytest.approx((0.35 + 0.15) / 2)
    assert found.auroc == 1.0
    assert found.brier == pytest.approx((0.01 + 0.64 + 0.04 + 0.01) / 4)


@pytest.mark.parametrize(
    ("count", "right", "says"),
    [
        (5, None, "at least 20"),
        (40, np.ones(40), "at least 5 right and 5 wrong"),
        (40, np.full(40, 0.5), "right .1. or wrong"),
        (40, np.ones(39), "40 answers"),
    ],
)
def test_what_can_not_be_fitted_is_refused(count, right, says):
    logprobs, margins, made = generations(count, seed=3)
    with pytest.raises(InvalidRequest, match=says):
        fit_calibration(logprobs, margins, made if right is None else right)


def test_one_class_has_no_reliability():
    with pytest.raises(InvalidRequest, match="add the other kind"):
        reliability(np.array([0.5, 0.6]), np.array([1.0, 1.0]))
