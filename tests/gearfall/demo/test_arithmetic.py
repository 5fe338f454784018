"""The question language: every draw is right, of its level and on its side of the split."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.demo.arithmetic import (
    LEVELS,
    TRAFFIC_MIX,
    TRAINING_MIX,
    Question,
    Split,
    ask,
    by_level,
    draw,
    draw_distinct,
    draw_mixed,
    is_correct,
    split_of,
)
from gearfall.demo.catalogue import demo_questions

operands = st.integers(min_value=0, max_value=999_999)
seeds = st.integers(min_value=0, max_value=2**32)


@given(left=operands, right=operands, operator=st.sampled_from("+-"))
def test_a_question_states_its_own_answer(left: int, right: int, operator: str) -> None:
    question = ask(left, operator, right)
    assert question.prompt.endswith("=")
    signed_right = right if operator == "+" else -right
    assert int(question.answer) == left + signed_right
    assert str(int(question.answer)) == question.answer


@given(level=st.sampled_from(LEVELS), split=st.sampled_from(Split), seed=seeds)
def test_a_draw_has_its_level_and_split(level: int, split: Split, seed: int) -> None:
    question = draw(level, split, Random(seed))
    left, right = question.prompt.removesuffix("=").replace("-", "+").split("+")
    assert max(len(left), len(right)) == level == question.level
    assert split_of(question) is split


@given(seed=seeds)
def test_the_same_seed_draws_the_same(seed: int) -> None:
    first, again = (draw_mixed(20, Split.TRAINING, Random(seed), TRAINING_MIX) for _ in range(2))
    assert first == again


def test_a_tenth_is_held_out_in_two_equal_parts() -> None:
    splits = [split_of(ask(a, sign, b)) for a in range(100) for b in range(100) for sign in "+-"]
    shares = [splits.count(split) / len(splits) for split in Split]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.005)


def test_the_split_never_changes() -> None:
    """The committed checkpoints were trained on this very split."""
    held_out = [q.prompt for a in range(20, 60) if split_of(q := ask(a, "+", 35)) is Split.TEST]
    assert held_out == ["37+35=", "51+35="]


def test_distinct_sets_do_not_overlap() -> None:
    calibration = set(draw_distinct(500, Split.CALIBRATION, Random(1)))
    test = set(draw_distinct(500, Split.TEST, Random(1)))
    training = set(draw_mixed(5000, Split.TRAINING, Random(1), TRAFFIC_MIX))
    assert not calibration & test
    assert not (calibration | test) & training


def test_a_distinct_set_follows_the_mix() -> None:
    questions = draw_distinct(500, Split.TEST, Random(2))
    assert len(questions) == len(set(questions)) == 500
    sizes = {level: len(positions) for level, positions in by_level(questions).items()}
    assert sizes == {level: 500 * share for level, share in TRAFFIC_MIX.items()}


def test_demo_questions_were_not_trained_on() -> None:
    questions = demo_questions(50, seed=3)
    assert questions == demo_questions(50, seed=3) != demo_questions(50, seed=4)
    assert {split_of(question) for question in questions} == {Split.TEST}


@pytest.mark.parametrize("generated", ["168 ", "0168", "", "169", "168="])
def test_the_judge_is_exact(generated: str) -> None:
    question = Question("123+45=", "168", 3)
    assert is_correct(question, "168")
    assert not is_correct(question, generated)


@pytest.mark.parametrize(("left", "operator", "right"), [(1, "*", 2), (-1, "+", 2), (1, "-", -2)])
def test_what_is_outside_the_language_is_refused(left: int, operator: str, right: int) -> None:
    with pytest.raises(ValueError, match=r"operator|operands"):
        ask(left, operator, right)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level 7"):
        draw(7, Split.TEST, Random(0))
