"""What foresees that a draft goes up: looks, what it continues, and that it is said once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.stages.stage_forecast import FIRST_LOOK_TOKENS, StageForecast
from services.router.stages.stage_watch import Yardstick

SUM = Yardstick("sequence_probability")
MEAN = Yardstick("mean_token_probability")


def said_at(forecast: StageForecast, logprobs: list[float]) -> list[int]:
    """Feed token by token; return after how many tokens something was said."""
    return [
        count
        for count in range(1, len(logprobs) + 1)
        if forecast.look(logprobs[:count], [1.0] * count)
    ]


def test_nothing_is_said_before_the_first_look():
    forecast = StageForecast(MEAN, threshold=0.9, usual_tokens=0)
    assert said_at(forecast, [-9.0] * 30) == [FIRST_LOOK_TOKENS]


def test_it_looks_again_at_twice_as_many():
    worse = [-0.01] * 6 + [-3.0] * 30
    forecast = StageForecast(MEAN, threshold=0.5, usual_tokens=0)
    # The mean falls below half within 8 tokens, which is when it is looked at again.
    assert said_at(forecast, worse) == [8]


def test_the_draft_goes_on_as_it_began_up_to_the_usual_length():
    # exp(-0.05 x 4) is certain enough, exp(-0.05 x 40) is not.
    assert said_at(StageForecast(SUM, threshold=0.5, usual_tokens=0), [-0.05] * 4) == []
    assert said_at(StageForecast(SUM, threshold=0.5, usual_tokens=40), [-0.05] * 4) == [4]


def test_tokens_that_come_together_are_looked_at_together():
    forecast = StageForecast(MEAN, threshold=0.9, usual_tokens=0)
    assert forecast.look([-1.0] * 50, [1.0] * 50)
    assert not forecast.look([-1.0] * 200, [1.0] * 200), "said once"


@given(
    logprob=st.floats(-5, 0),
    threshold=st.floats(0.01, 1),
    count=st.integers(FIRST_LOOK_TOKENS, 64),
    usual=st.integers(0, 64),
)
def test_an_even_draft_is_foreseen_as_it_ends(logprob, threshold, count, usual):
    """Where all tokens are alike, the forecast at the first look is the answer's own certainty."""
    length = max(count, usual)
    whole = SUM.certainty([logprob] * length, [1.0] * length)
    if whole == pytest.approx(threshold, rel=1e-6):
        return
    forecast = StageForecast(SUM, threshold=threshold, usual_tokens=usual)
    assert forecast.look([logprob] * count, [1.0] * count) == (whole < threshold)
