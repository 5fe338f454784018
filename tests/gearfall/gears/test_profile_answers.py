"""A profile's answers as the planner's columns."""

import pytest

from gearfall.core.profile import Generation, Profile, ProfiledModel
from gearfall.gears.answers import check_answers
from gearfall.gears.profile_answers import answers_of


def test_a_beginning_that_is_the_whole_answer_costs_no_more_than_it():
    """Of these costs times so many tokens, some are rounded up when they are divided again."""
    asked = [(cost * 1e-6, prompt) for cost in range(101, 121) for prompt in range(20, 40)]
    assert any(cost * (prompt + 5) / (prompt + 5) > cost for cost, prompt in asked)
    generations = tuple(
        Generation(float(at % 2), cost, prompt, 5, (-0.1,) * 5, (1.0,) * 5)
        for at, (cost, prompt) in enumerate(asked)
    )
    names = tuple(f"q{at}" for at in range(len(asked)))
    profile = Profile(1.0, "USD", names, (ProfiledModel("m", generations=generations),))
    found = answers_of(profile, {"m": [0.5] * len(asked)}, hold_tokens=8)
    check_answers(found)
    (only,) = found
    assert only.spent_up.tolist() == pytest.approx(only.cost.tolist())
