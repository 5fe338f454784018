"""Drafts of chosen correctness, and when they are worth their verification."""

import pytest

from bench.cascade.draft_work import Timed, Worth, break_even, draft_with_prefix, worth_of
from bench.measuring.spread import Spread


@pytest.mark.parametrize(("share", "right"), [(0.0, 0), (0.25, 2), (0.9, 7), (1.0, 8)])
def test_a_draft_is_right_up_to_its_share_and_wrong_behind(share, right):
    answer = (0, 1, 2, 3, 96, 97, 98, 99)
    draft = draft_with_prefix(answer, share, 100)
    assert len(draft) == len(answer)
    assert draft[:right] == answer[:right]
    assert all(0 <= each < 100 for each in draft)
    assert all(mine != its for mine, its in zip(draft[right:], answer[right:], strict=True))


def test_rounds_are_summed_up_as_ratios_of_each_round():
    rounds = [
        Timed(2.0, 3.0, 10, 8, 6, is_same=True),
        Timed(1.0, 3.0, 10, 8, 4, is_same=True),
        Timed(4.0, 2.0, 10, 4, 2, is_same=False),
    ]
    worth = worth_of("m", 2, "some", rounds)
    assert worth.ratio == Spread(1.5, 0.5, 3.0)
    assert worth.accepted_share == pytest.approx(12 / 30)
    assert (worth.draft_tokens, worth.accepted_tokens, worth.differing_rounds) == (20, 12, 1)


def worth(share, ratio):
    return Worth("m", 1, "", Spread(ratio, ratio, ratio), share, 1, 1, 0)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.5, 1.2), (0.0, 0.8)], 0.25),
        ([(0.0, 0.9), (0.5, 0.95), (1.0, 1.05)], 0.75),
        ([(0.0, 1.0), (1.0, 3.0)], 0.0),
        ([(0.0, 0.7), (1.0, 0.9)], None),
    ],
)
def test_a_draft_saves_time_from_where_the_line_crosses(points, expected):
    found = break_even([worth(*point) for point in points])
    assert found == (None if expected is None else pytest.approx(expected))
