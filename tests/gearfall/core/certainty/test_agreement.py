import pytest

from gearfall.core.certainty.agreement import EXACT, NORMALISED, answer_key, parse_rule
from gearfall.core.errors import InvalidRequest


@pytest.mark.parametrize(
    ("one", "other", "exactly", "normally"),
    [
        ("42", "42", True, True),
        ("42", " 42\n", True, True),
        ("42", "43", False, False),
        ("Paris", "paris.", False, True),
        ("The  cat\nsat", "the cat sat", False, True),
        ("\ufb01ne", "fine", False, True),
        ("", "...", False, True),
        ("-5", "5", False, True),
    ],
)
def test_what_counts_as_the_same(one, other, exactly, normally):
    assert (answer_key(one, EXACT) == answer_key(other, EXACT)) is exactly
    assert (answer_key(one, NORMALISED) == answer_key(other, NORMALISED)) is normally


def test_a_key_is_short_and_takes_any_text():
    assert len(answer_key("secret " * 1000, EXACT)) == 16
    assert answer_key("\ud800", EXACT)


def test_an_unknown_rule_is_refused():
    assert parse_rule("exact", param="rule") == EXACT
    with pytest.raises(InvalidRequest, match="exact, normalised"):
        parse_rule("close enough", param="rule")
