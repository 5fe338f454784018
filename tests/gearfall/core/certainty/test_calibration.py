import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.calibration import Calibration, calibrated, check_calibration
from gearfall.core.certainty.certainty_features import FEATURES, features_of
from gearfall.core.certainty.token_entropy import pair_entropy
from gearfall.core.errors import InvalidRequest

PLAIN = Calibration(("mean",), (-1.0,), (0.5,), (2.0,), 0.25, ((0.2, 0.1), (0.8, 0.9)))
any_float = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(any_float, any_float), max_size=12))
def test_every_answer_has_finite_features(tokens):
    values = features_of(tuple(FEATURES), [t for t, _ in tokens], [m for _, m in tokens])
    assert len(values) == len(FEATURES)
    assert all(map(math.isfinite, values))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min", -3.0),
        ("q50", -1.0),
        ("q25", -2.0),
        ("mean", -5 / 3),
        ("sum", -5.0),
        ("first", -1.0),
        ("min_margin", 0.5),
        ("mean_margin", 1.5),
        ("log_length", math.log(3)),
        ("mean_entropy", (2 * pair_entropy(-1.0, 2.0) + pair_entropy(-3.0, 0.5)) / 3),
        ("max_entropy", pair_entropy(-3.0, 0.5)),
    ],
)
def test_features(name, value):
    assert features_of([name], [-1.0, -3.0, -1.0], [2.0, 0.5, 2.0])[0] == pytest.approx(value)


@pytest.mark.parametrize(
    ("mean_logprob", "expected"),
    [
        # score = 0.25 + 2 (mean + 1) / 0.5; logistic; then the line from (0.2, 0.1) to (0.8, 0.9)
        (-1.0, 0.1 + (1 / (1 + math.exp(-0.25)) - 0.2) / 0.6 * 0.8),
        (-30.0, 0.1),
        (0.0, 0.9),
    ],
)
def test_the_curve_is_followed_and_never_left(mean_logprob, expected):
    assert calibrated(PLAIN, [mean_logprob], [1.0]) == pytest.approx(expected)


@given(st.lists(st.floats(-40.0, 0.0), min_size=1, max_size=6), st.floats(0.0, 1.0))
def test_more_of_a_feature_with_positive_weight_is_never_less_certain(logprobs, more):
    better = [min(0.0, each + more) for each in logprobs]
    margins = [1.0] * len(logprobs)
    assert calibrated(PLAIN, better, margins) >= calibrated(PLAIN, logprobs, margins) - 1e-12


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features": ("mood",)}, "one or more of"),
        ({"features": ()}, "one or more of"),
        ({"means": ()}, "means must hold 1"),
        ({"weights": (math.nan,)}, "weights must hold"),
        ({"scales": (0.0,)}, "scales above 0"),
        ({"bias": math.inf}, "finite bias"),
        ({"knots": ()}, "0 knots"),
        ({"knots": ((0.1, 0.5), (0.1, 0.6))}, "must rise"),
        ({"knots": ((0.1, 0.5), (0.2, 0.4))}, "must rise"),
        ({"knots": ((0.1, 1.5),)}, "in 0 to 1"),
    ],
)
def test_what_could_not_be_applied_is_refused(changes, says):
    with pytest.raises(InvalidRequest, match=says):
        check_calibration(replace(PLAIN, **changes), "plan.calibrations.small")
    check_calibration(PLAIN, "plan.calibrations.small")
