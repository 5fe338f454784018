"""Certainty measures: known values and bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.certainty import MEASURES, measure_certainty, parse_measure
from gearfall.core.errors import InvalidRequest

LOGPROBS = [math.log(0.5), math.log(0.8), math.log(0.9)]
MARGINS = [math.log(5), math.log(8), math.log(9)]


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("sequence_probability", 0.5 * 0.8 * 0.9),
        ("mean_token_probability", (0.5 * 0.8 * 0.9) ** (1 / 3)),
        ("min_token_probability", 0.5),
        ("min_margin", 0.5 - 0.1),
        # Tokens of 0.5, 0.8, 0.9 whose second has 0.1 each, and a rest of at most 0.1 each.
        (
            "entropy",
            (0.5**0.5 * 0.8**0.8 * 0.9**0.9 * 0.1 ** (0.5 + 0.2 + 0.1)) ** (1 / 3),
        ),
    ],
)
def test_known_values(measure, value):
    assert measure_certainty(measure, LOGPROBS, MARGINS) == pytest.approx(value)


@pytest.mark.parametrize("measure", MEASURES)
def test_no_token_and_nonsense_are_uncertain(measure):
    assert measure_certainty(measure, [], []) == 0.0
    assert measure_certainty(measure, [math.nan], [math.nan]) == 0.0
    assert measure_certainty(measure, [-math.inf], [0.0]) == 0.0


@pytest.mark.parametrize("measure", MEASURES)
def test_a_sure_answer_is_certain(measure):
    assert measure_certainty(measure, [0.0, 0.0], [math.inf, 80.0]) == pytest.approx(1.0)


@pytest.mark.parametrize("measure", MEASURES)
@given(tokens=st.lists(st.tuples(st.floats(-50, 0.001), st.floats(0, 50)), min_size=1))
def test_stays_in_bounds(measure, tokens):
    logprobs, margins = zip(*tokens, strict=True)
    assert 0.0 <= measure_certainty(measure, logprobs, margins) <= 1.0


@pytest.mark.parametrize("measure", ["sequence_probability", "min_token_probability", "min_margin"])
@given(
    tokens=st.lists(st.tuples(st.floats(-5, 0), st.floats(0, 5)), min_size=1),
    more=st.tuples(st.floats(-5, 0), st.floats(0, 5)),
)
def test_one_more_token_never_adds_certainty(measure, tokens, more):
    """So the end-of-sequence token counts, and a longer answer is not surer than its beginning."""
    before = measure_certainty(measure, *zip(*tokens, strict=True))
    after = measure_certainty(measure, *zip(*tokens, more, strict=True))
    assert after <= before + 1e-12


def test_an_unknown_measure_is_refused():
    with pytest.raises(InvalidRequest, match="sequence_probability"):
        parse_measure("vibes")
