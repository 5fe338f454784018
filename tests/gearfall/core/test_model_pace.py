"""What is learned about a model's speed, and that odd answers move nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.model_pace import FIT_EVERY, NEWEST, ModelPace, Timing, UsualLength, theil_sen


def learned(*answers: tuple[int, float, int, float]) -> ModelPace:
    pace = ModelPace()
    for answer in answers:
        pace.learn(Timing(*answer))
    return pace


def test_nothing_learned_is_no_time():
    assert ModelPace().answer_s(1000, 1000) == 0.0
    assert UsualLength().tokens(10) == 0.0


def test_one_answer_says_something():
    pace = learned((100, 0.5, 10, 0.2))
    assert pace.answer_s(100, 11) == pytest.approx(0.7)
    assert pace.answer_s(900, 11) == pytest.approx(0.7), "one point has no slope"


def test_a_line_over_the_prompt_and_a_pace_behind_it():
    answers = [(tokens, 0.1 + 0.002 * tokens, 20, 0.4) for tokens in (10, 50, 200, 400)]
    assert learned(*answers).answer_s(1000, 51) == pytest.approx(0.1 + 2.0 + 1.0)


def test_a_one_token_answer_says_nothing_about_the_pace():
    assert learned((10, 0.5, 0, 0.0)).answer_s(10, 100) == pytest.approx(0.5)


def test_the_right_tokens_of_a_draft_take_no_step_but_come_with_any_answer():
    pace, further_tokens, right = ModelPace(), 11, 8
    for tokens in (10, 20):
        # Eight of twelve tokens come with the first one, and three steps of 20 ms follow.
        pace.learn(Timing(tokens, 0.1, further_tokens, 3 * 0.02, right_draft_tokens=right))
    assert pace.step_s == pytest.approx(0.02)
    assert pace.answer_s(10, 12) == pytest.approx(0.1 + 3 * 0.02)


@pytest.mark.parametrize("right", [5, 8])
def test_an_answer_that_its_draft_brought_whole_says_nothing_about_a_step(right):
    """A stop string may have cut it, and the draft went on."""
    pace = learned((10, 0.1, 4, 0.08))
    pace.learn(Timing(10, 0.1, 5, 0.001, right_draft_tokens=right))
    assert pace.step_s == pytest.approx(0.02)


@given(odd=st.lists(st.floats(0, 1e4), max_size=FIT_EVERY), at=st.integers(0, NEWEST))
def test_odd_answers_move_nothing(odd, at):
    usual = [(tokens, 0.1 + 0.001 * tokens, 10, 0.1) for tokens in range(0, NEWEST * 10, 10)]
    # Fewer than 29 % of the points: what the median of all pairs withstands.
    mixed = usual[: NEWEST - len(odd)]
    for seconds in odd:
        mixed.insert(min(at, len(mixed)), (100, seconds, 10, seconds))
    assert learned(*mixed).answer_s(200, 11) == pytest.approx(0.4, abs=0.1)


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 100)), min_size=1, max_size=32))
def test_a_line_never_falls_and_never_says_less_than_nothing(points):
    line = theil_sen(points)
    assert line.slope >= 0
    assert 0 <= line.at(0) <= line.at(10) <= line.at(1000)


def test_a_usual_length_forgets_and_keeps_to_the_limit():
    length = UsualLength()
    for tokens in (*[500] * NEWEST, *[20] * NEWEST):
        length.learn(tokens)
    assert length.tokens(100) == 20
    assert length.tokens(8) == 8
