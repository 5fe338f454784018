import math
from dataclasses import replace

import pytest

from gearfall.core.certainty.certainty import MEASURES, measure_certainty
from gearfall.core.errors import InvalidRequest
from gearfall.core.profile import (
    LOGPROBS,
    MARGINS,
    DrawnAnswer,
    Generation,
    Profile,
    ProfiledModel,
    Speed,
    check_profile,
    parse_profile,
    profile_text,
)

RIGHT = Generation(1.0, 5.0, 10, 2, (-0.1, -0.2), (3.0, 4.0))
WRONG = Generation(0.0, 5.0, 10, 1, (-2.0,), (0.1,))
SMALL = ProfiledModel(
    "small", "d" * 32, 10**6, 16, {"cpu": Speed(1e-4, 0.01, 1e-3)}, {"dram": 0.2}, (RIGHT, WRONG)
)
PROFILE = Profile(1.0, "FLOP", ("q1", "q2"), (SMALL,))


def with_model(**changes) -> Profile:
    return replace(PROFILE, models=(replace(SMALL, **changes),))


def with_first(**changes) -> Profile:
    return with_model(generations=(replace(RIGHT, **changes), WRONG))


def with_drawn(**changes) -> Profile:
    return with_first(drawn=(replace(DrawnAnswer("5", 1.0, 5.0, 2, 0.5), **changes),))


def test_a_profile_is_read_as_it_was_written():
    assert parse_profile(profile_text(PROFILE)) == PROFILE
    assert parse_profile(profile_text(with_drawn())) == with_drawn()
    assert PROFILE.model("small") is SMALL
    with pytest.raises(InvalidRequest, match="it has small"):
        PROFILE.model("large")


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        (replace(PROFILE, format_version=9), "format_version: 9"),
        (replace(PROFILE, agreement_rule="roughly"), "agreement_rule 'roughly'"),
        (replace(PROFILE, drawn_temperature=0.0), "drawn_temperature 0 must be above 0"),
        (replace(PROFILE, drawn_temperature=math.nan), "drawn_temperature nan"),
        (replace(PROFILE, drawn_temperature=2.5), "at most 2"),
        (replace(PROFILE, models=()), "there is none"),
        (replace(PROFILE, models=(SMALL, SMALL)), "small is there twice"),
        (replace(PROFILE, queries=("q1", "q1")), "q1 is there twice"),
        (with_model(generations=(RIGHT,)), "1 for 2 queries"),
        (with_model(speeds={"cpu": Speed(math.nan, 1.0, 1.0)}), "prefill_s_per_token: nan"),
        (with_model(speeds={"cpu": Speed(0.0, 0.0, 0.0)}), "step_s: must be above 0"),
        (with_model(speeds={"cpu": Speed(0.0, 1.0, 0.0, job_s=-1.0)}), "job_s: -1"),
        (with_model(speeds={"cpu": Speed(0.0, 1.0, 0.0, ((2, 1.0), (1, 1.0)))}), "rising"),
        (with_model(speeds={"cpu": Speed(0.0, 1.0, 0.0, ((1, 0.0),))}), "each time above 0"),
        (with_model(speeds={"cpu": Speed(0.0, 1.0, 0.0, ((1, 0.2),), tell_s=0.2)}), "tell_s: must"),
        (with_model(speeds={"cpu": Speed(0.0, 1.0, 0.0, tell_s=1.0)}), "tell_s: must be below"),
        (with_model(start_s={"ssd": -1.0}), "start_s.ssd: -1.0"),
        (with_first(quality=2.0), "query q1: quality: 2.0"),
        (with_first(cost=0.0), "above 0"),
        (with_first(cost=math.inf), "cost: inf"),
        (with_first(output_tokens=-1), "not be negative"),
        (with_first(prompt_tokens=10**12), "tokens: must be at most 100000000"),
        (with_first(output_tokens=10**12), "tokens: must be at most 100000000"),
        (with_first(logprobs=(-0.1, 1000.0)), "q1: logprobs: 1000; each must be in -10000 to 0.0"),
        (with_first(logprobs=(math.nan, -0.1)), "logprobs: nan"),
        (with_first(logprobs=(-math.inf, -0.1)), "logprobs: -inf"),
        (with_first(margins=(3.0, -5000.0)), "q1: margins: -5000; each must be in -500 to 10000"),
        (with_first(margins=(math.nan, 1.0)), "margins: nan"),
        (with_first(margins=(3.0, math.inf)), "margins: inf"),
        (with_first(margins=()), "2 logprobs and 0 margins"),
        (with_first(logprobs=(), margins=()), "one of them is needed"),
        (with_first(certainty=math.nan), "certainty: nan"),
        (with_first(certainty=0.9), "query q1: both logprobs and a certainty"),
        (with_drawn(quality=1.5), r"q1: drawn\[0\].quality: 1.5"),
        (with_drawn(cost=math.inf), "cost: inf"),
        (with_drawn(probability=1.1), "probability: 1.1"),
        (with_drawn(output_tokens=-1), "output_tokens: must be in 0 to"),
        (with_drawn(answer_key=""), "nothing can be compared"),
    ],
)
def test_what_nothing_can_be_planned_from_is_refused(profile, says):
    with pytest.raises(InvalidRequest, match=says):
        check_profile(profile)


def test_rounding_and_second_choices_are_no_defects():
    check_profile(with_first(logprobs=(1e-6, -9999.0), margins=(30.0, -2.0)))


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_takes_the_ends_of_what_is_accepted(measure):
    for logprob in LOGPROBS:
        for margin in MARGINS:
            check_profile(with_first(logprobs=(logprob,) * 2, margins=(margin,) * 2))
            assert 0.0 <= measure_certainty(measure, (logprob,) * 2, (margin,) * 2) <= 1.0


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 5000, b"\xff"])
def test_what_is_no_profile(text):
    with pytest.raises(InvalidRequest, match="no profile"):
        parse_profile(text)
