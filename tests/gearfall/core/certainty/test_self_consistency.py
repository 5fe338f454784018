"""What several answers come to, and when the rest of them can't change it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.self_consistency import (
    SelfConsistency,
    Vote,
    check_self_consistency,
    consensus,
    is_decided,
)
from gearfall.core.errors import InvalidRequest


def votes(text: str) -> list[Vote | None]:
    """`a9 b5 --`: answers with their probability in tenths; `--` did not come."""
    return [None if each == "--" else Vote(each[0], int(each[1:]) / 10) for each in text.split()]


@pytest.mark.parametrize(
    ("answers", "place", "agreeing", "lead", "certainty"),
    [
        ("a9 a5 a7", 0, 3, 3, (2 + 0.9) / 3),
        ("a9 b5 b7", 2, 2, 1, (1 + 0.7) / 3),
        ("a2 b5 c4", 1, 1, 0, 0.5 / 3),
        ("a2 -- --", 0, 1, 1, 0.2 / 3),
        ("-- b3 b4 a9", 2, 2, 1, (1 + 0.4) / 4),
        ("a5 a5", 0, 2, 2, (1 + 0.5) / 2),
        ("a1 a1 b9 b1", 2, 2, 0, (1 + 0.9) / 4),
        ("a0 a0", 0, 2, 2, 1 / 2),
    ],
)
def test_the_most_probable_of_the_largest_group_is_shown(answers, place, agreeing, lead, certainty):
    found = consensus(votes(answers))
    assert found is not None
    assert (found.place, found.agreeing, found.lead) == (place, agreeing, lead)
    assert found.certainty == pytest.approx(certainty)


def test_without_an_answer_there_is_none():
    assert consensus([None, None]) is None


@pytest.mark.parametrize(
    ("answers", "threshold", "decided"),
    [
        ("a9 a5 --", 0.5, True),  # certain, and no other can have as many
        ("a9 a5 --", 0.7, False),  # a third equal one would do
        ("a9 -- --", 0.3, False),  # certain, but two others may agree on something else
        ("a9 b5 --", 0.7, True),  # no three are the same any more
        ("a9 b5 --", 0.6, False),
        ("a9 b5 c9 --", 0.6, True),
        ("a9 a9 b5 b5 --", 0.2, False),  # it may still be b
    ],
)
def test_the_rest_is_not_waited_for_when_it_changes_nothing(answers, threshold, decided):
    found, given_ = consensus(votes(answers)), votes(answers)
    assert found is not None
    pending = given_.count(None)
    assert is_decided(found, asked=len(given_), pending=pending, threshold=threshold) == decided


ANSWERS = st.builds(Vote, st.sampled_from("abc"), st.floats(0.0, 1.0))


@given(
    st.lists(ANSWERS, min_size=2, max_size=8),
    st.floats(0.0, 1.0),
    st.randoms(use_true_random=False),
)
def test_what_is_decided_early_is_what_all_answers_would_have_decided(all_of, threshold, random):
    whole = consensus(all_of)
    assert whole is not None
    order = list(range(len(all_of)))
    random.shuffle(order)
    for count in range(1, len(all_of) + 1):
        there = [vote if at in order[:count] else None for at, vote in enumerate(all_of)]
        found = consensus(there)
        assert found is not None
        pending = len(all_of) - count
        if not is_decided(found, asked=len(all_of), pending=pending, threshold=threshold):
            assert pending > 0
            continue
        assert (found.certainty >= threshold) == (whole.certainty >= threshold)
        if found.certainty >= threshold:
            assert all_of[found.place].key == all_of[whole.place].key


@pytest.mark.parametrize("samples", [1, 0, -1, 9])
def test_too_few_and_too_many_answers_are_refused(samples):
    with pytest.raises(InvalidRequest, match="between 2 and 8"):
        check_self_consistency(SelfConsistency(samples), "stages[0].self_consistency")


@pytest.mark.parametrize("temperature", [0.0, -1.0, 2.5, float("nan"), float("inf")])
def test_a_temperature_that_draws_nothing_or_anything_is_refused(temperature):
    with pytest.raises(InvalidRequest, match="above 0") as caught:
        check_self_consistency(SelfConsistency(3, temperature), "s")
    assert caught.value.param == "s.temperature"


def test_what_can_be_asked_is_taken():
    check_self_consistency(SelfConsistency(2, 0.01), "s")
    check_self_consistency(SelfConsistency(8, 2.0), "s")
