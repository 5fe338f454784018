"""How a moved answer is held against an undisturbed one."""

import pytest

from gearfall.demo.migrate import Move, Reading, compare

ALONE = Reading((1, 2, 3, 4), "abcd", (0.1, 0.1, 0.2), epochs=1)
MOVE = Move(2, "a", "b", "tokens", 1, 0.01, 0.05)


def moved(token_ids=(1, 2, 3, 4), text="abcd", epochs=2) -> Reading:
    return Reading(tuple(token_ids), text, (0.1, 0.4, 0.1), epochs)


@pytest.mark.parametrize(
    ("reading", "same_tokens", "is_same"),
    [
        (moved(), 4, True),
        (moved((1, 2, 9, 4)), 3, False),
        (moved((1, 2, 3)), 3, False),
        (moved((1, 2, 3, 4, 5)), 4, False),
        (moved(text="abce"), 4, False),
        (moved(epochs=1), 4, False),
        (moved(epochs=3), 4, False),
    ],
)
def test_one_difference_is_enough(reading, same_tokens, is_same):
    found = compare(reading, ALONE, [MOVE])
    assert (found.same_tokens, found.is_same) == (same_tokens, is_same)
    assert found.longest_gap_s == 0.4
    assert found.undisturbed_median_gap_s == 0.1
