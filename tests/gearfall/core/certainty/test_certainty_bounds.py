"""What an answer's certainty can still reach: known values, and never less than what came of it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.calibration import Calibration, calibrated
from gearfall.core.certainty.certainty import MEASURES, measure_certainty
from gearfall.core.certainty.certainty_bounds import bound_of, has_bound
from gearfall.core.certainty.certainty_features import FEATURES
from gearfall.core.certainty.token_entropy import pair_entropy

BOUNDED = (
    *("sequence_probability", "mean_token_probability", "min_token_probability"),
    *("min_margin", "entropy"),
)
LOGPROBS = st.floats(-40, 0) | st.sampled_from([-0.0, 0.0, -math.inf, math.nan])
MARGINS = st.floats(0, 60) | st.sampled_from([0.0, math.inf, math.nan])
TOKENS = st.lists(st.tuples(LOGPROBS, MARGINS), max_size=12)


def most(measure, tokens, left, calibration=None):
    bound = bound_of(measure, calibration)
    for logprob, margin in tokens:
        bound.add(logprob, margin)
    return bound.most(left)


def split(tokens):
    return [each[0] for each in tokens], [each[1] for each in tokens]


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("sequence_probability", 0.5 * 0.8),
        ("mean_token_probability", (0.5 * 0.8) ** (1 / 5)),
        ("min_token_probability", 0.5),
        ("min_margin", 0.5 - 0.1),
    ],
)
def test_known_values(measure, value):
    tokens = [(math.log(0.5), math.log(5)), (math.log(0.8), math.log(8))]
    assert most(measure, tokens, 3) == pytest.approx(value)


@pytest.mark.parametrize("measure", BOUNDED)
def test_everything_is_possible_before_the_first_token(measure):
    assert has_bound(measure)
    assert most(measure, [], 5) == 1.0


def test_what_has_no_bound_never_falls():
    assert not has_bound("somebody's own")
    assert most("somebody's own", [(-30.0, 0.0)], 0) == 1.0


@pytest.mark.parametrize("measure", MEASURES)
@given(begun=TOKENS, rest=TOKENS, spare=st.integers(0, 5))
def test_no_continuation_exceeds_it(measure, begun, rest, spare):
    reached = measure_certainty(measure, *split([*begun, *rest]))
    assert reached <= most(measure, begun, len(rest) + spare)


@pytest.mark.parametrize("measure", BOUNDED)
@given(
    begun=st.lists(st.tuples(st.floats(-9, 0), st.floats(0, 9)), min_size=1), left=st.integers(0, 9)
)
def test_certain_tokens_reach_it(measure, begun, left):
    """So it is the least bound there is: nothing that is hopeless goes on for long."""
    reached = measure_certainty(measure, *split([*begun, *[(0.0, math.inf)] * left]))
    assert reached == pytest.approx(most(measure, begun, left), rel=1e-6)


@st.composite
def calibrations(draw):
    names = draw(st.lists(st.sampled_from(sorted(FEATURES)), min_size=1, unique=True))
    count = len(names)
    numbers = st.lists(st.floats(-5, 5), min_size=count, max_size=count).map(tuple)
    scales = st.lists(st.floats(0.01, 5), min_size=count, max_size=count).map(tuple)
    xs = sorted(draw(st.sets(st.floats(0, 1), min_size=1, max_size=5)))
    ys = sorted(draw(st.lists(st.floats(0, 1), min_size=len(xs), max_size=len(xs))))
    return Calibration(
        tuple(names),
        draw(numbers),
        draw(scales),
        draw(numbers),
        draw(st.floats(-3, 3)),
        tuple(zip(xs, ys, strict=True)),
    )


@given(calibration=calibrations(), begun=TOKENS, rest=TOKENS, spare=st.integers(0, 5))
def test_no_continuation_exceeds_a_calibrated_bound(calibration, begun, rest, spare):
    reached = calibrated(calibration, *split([*begun, *rest]))
    assert reached <= most("", begun, len(rest) + spare, calibration)


def calibration_of(name, weight):
    return Calibration((name,), (0.0,), (1.0,), (weight,), 0.0, ((0.0, 0.0), (1.0, 1.0)))


@pytest.mark.parametrize(
    ("name", "weight", "score"),
    [
        ("min", 1.0, -2.0),
        ("min", -1.0, 30.0),
        ("q50", 1.0, -0.5),
        ("mean", 1.0, -3.0 / 4),
        ("sum", 1.0, -3.0),
        ("first", 1.0, -1.0),
        ("first", -1.0, 1.0),
        ("min_margin", 1.0, 0.5),
        ("min_margin", -1.0, 0.0),
        ("mean_margin", 1.0, (2.0 + 60.0) / 4),
        ("log_length", 1.0, math.log(4)),
        ("log_length", -1.0, -math.log(2)),
        ("max_entropy", 1.0, 60.0),
        ("max_entropy", -1.0, -pair_entropy(-2.0, 1.5)),
        ("mean_entropy", -1.0, -(pair_entropy(-1.0, 0.5) + pair_entropy(-2.0, 1.5)) / 4),
    ],
)
def test_calibrated_features_at_the_end_of_their_range(name, weight, score):
    bound = most("", [(-1.0, 0.5), (-2.0, 1.5)], 2, calibration_of(name, weight))
    assert bound == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-6)


def test_a_calibration_with_a_feature_without_range_is_never_hopeless():
    unknown = calibration_of("mood", 1.0)
    assert not has_bound("", unknown)
    assert most("", [(-30.0, 0.0)], 0, unknown) == 1.0
