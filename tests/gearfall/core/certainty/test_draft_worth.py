"""When a hopeless draft goes on: by hand, and against every number of tokens it might have had."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.draft_worth import (
    MIN_DRAFTS,
    NEWEST,
    Agreed,
    DraftTerms,
    is_worth_a_token,
)


@pytest.mark.parametrize(
    ("drafted", "rate", "below_s", "above_s", "verify_s", "expected"),
    [
        (0, 0.9, 1.0, 10.0, 0.5, True),  # 9 saved for 1.5
        (10, 0.9, 1.0, 10.0, 0.5, True),  # 0.9^11 of 10 is 3.1
        (20, 0.9, 1.0, 10.0, 0.5, False),  # 0.9^21 of 10 is 1.1
        (0, 0.9, 1.0, 1.0, 0.0, False),  # the stage above is no slower
        (0, 0.9, 1.0, 10.0, 9.0, False),  # verifying costs as much as generating
        (0, 0.0, 0.0, 10.0, 0.0, False),  # nothing is known
        (500, 1.0, 1.0, 1.6, 0.5, True),
    ],
)
def test_another_token(drafted, rate, below_s, above_s, verify_s, expected):
    terms = DraftTerms(rate, below_s, above_s, verify_s)
    assert is_worth_a_token(drafted, terms) is expected


TIMES = st.floats(0.001, 10.0)


@given(rate=st.floats(0.0, 0.99), below_s=TIMES, above_s=TIMES, verify_s=TIMES)
def test_going_on_while_it_is_worth_it_is_the_best_length(rate, below_s, above_s, verify_s):
    """Expected seconds of a draft of n tokens: its own, and the steps above that it leaves."""
    terms, longest = DraftTerms(rate, below_s, above_s, verify_s), 60
    chosen = next((k for k in range(longest) if not is_worth_a_token(k, terms)), longest)

    def taken_s(tokens):
        spared = sum(rate**place for place in range(1, tokens + 1))
        return tokens * (below_s + verify_s) - spared * above_s

    assert taken_s(chosen) <= min(taken_s(n) for n in range(longest + 1)) + 1e-9


def test_the_rate_is_over_tokens_that_were_held_against_an_answer():
    agreed = Agreed()
    for _ in range(MIN_DRAFTS - 1):
        agreed.learn(10, 4)
    assert agreed.rate == 0.0, "too few drafts"
    agreed.learn(6, 6)
    # 18 agreed; three drafts ended at a wrong one, what came behind it says nothing; and one more.
    assert agreed.rate == pytest.approx(18 / (18 + 3 + 1))


def test_old_drafts_are_forgotten():
    agreed = Agreed()
    for _ in range(NEWEST):
        agreed.learn(5, 0)
    assert agreed.rate == 0.0
    for _ in range(NEWEST):
        agreed.learn(5, 5)
    assert agreed.rate == pytest.approx(5 * NEWEST / (5 * NEWEST + 1))
