"""What a profile says of a model that is asked several times."""

from dataclasses import replace

import pytest

from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.profile import DrawnAnswer, Generation, Profile, ProfiledModel
from gearfall.gears.counted_answers import asked_several, counted, counted_columns, counted_of

OWN = Generation(0.0, 10.0, 4, 2, (-0.5, -0.5), (1.0, 1.0), answer_key="wrong", token_ids=(1,))
RIGHT = DrawnAnswer("right", 1.0, 8.0, 3, 0.3)
WRONG = DrawnAnswer("wrong", 0.0, 9.0, 2, 0.2)


def profile(*generations: Generation) -> Profile:
    model = ProfiledModel("small", generations=generations)
    return Profile(
        1.0, "FLOP", tuple(f"q{n}" for n in range(len(generations))), (model,),
        drawn_temperature=0.9,
    )  # fmt: skip


def test_the_majority_decides_against_the_usual_answer():
    found = counted(replace(OWN, drawn=(RIGHT, RIGHT)), 3)
    assert (found.key, found.quality) == ("right", 1.0)
    assert found.certainty == pytest.approx((1 + 0.3) / 3)
    assert found.cost == 10.0 + 8.0 + 8.0
    assert found.output_tokens == (2, 3, 3)


def test_only_as_many_answers_count_as_are_asked_for():
    found = counted(replace(OWN, drawn=(WRONG, RIGHT, RIGHT)), 2)
    assert (found.key, found.quality, found.cost) == ("wrong", 0.0, 19.0)
    # The usual answer is the more probable of the two equal ones: exp(-1).
    assert found.certainty == pytest.approx((1 + 0.36788) / 2, abs=1e-4)


def test_an_answer_without_a_token_is_never_probable():
    empty = Generation(0.0, 1.0, 4, 0, answer_key="nothing", drawn=(WRONG,))
    assert counted(empty, 2).key == "wrong"
    assert counted(empty, 2).output_tokens == (1, 2)


def test_columns_are_the_counted_answers():
    several = SelfConsistency(3, 0.9)
    rows = (replace(OWN, drawn=(RIGHT, RIGHT)), replace(OWN, drawn=(WRONG, RIGHT)))
    found = counted_columns("small", rows, several)
    assert found.asked == ("small", several)
    assert found.correct.tolist() == [1.0, 0.0]
    assert found.cost.tolist() == [26.0, 27.0]
    assert counted_of(profile(*rows), None) == ()
    (same,) = counted_of(profile(*rows), several)
    assert same.certainty.tolist() == found.certainty.tolist()


def test_the_temperature_is_that_of_the_profile():
    rows = (replace(OWN, drawn=(RIGHT, RIGHT)),)
    assert asked_several(profile(*rows), 3) == SelfConsistency(3, 0.9)


@pytest.mark.parametrize(
    ("rows", "samples", "says"),
    [
        ((replace(OWN, drawn=(RIGHT, RIGHT)), OWN), 3, "0 drawn answers .* 2 are needed"),
        ((replace(OWN, drawn=(RIGHT,)),), 3, "profile --samples 2"),
        ((replace(OWN, answer_key="", drawn=(RIGHT, RIGHT)),), 3, "0 drawn"),
        ((replace(OWN, drawn=(RIGHT, RIGHT)),), 9, "between 2 and 8"),
        ((replace(OWN, drawn=(RIGHT, RIGHT)),), 1, "between 2 and 8"),
    ],
)
def test_what_was_not_measured_can_not_be_planned(rows, samples, says):
    with pytest.raises(InvalidRequest, match=says):
        asked_several(profile(*rows), samples)
