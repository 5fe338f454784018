"""What a canary is, and when an engine's answer to it counts as the same."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import CorruptCheckpoint
from gearfall.core.generation.canary import (
    ANSWER_TOKENS,
    MAX_CANARY_BYTES,
    Canary,
    CanaryToken,
    answer_length,
    canary_bytes,
    canary_prompt,
    check_answer,
    parse_canary,
)

SURE = CanaryToken(token_id=4, logprob=-0.5, margin=2.0, tolerance=0.01)
UNSURE = CanaryToken(token_id=7, logprob=-0.7, margin=0.001, tolerance=0.01)
CANARY = Canary((1, 9), (SURE, UNSURE))
SAME = [(4, -0.5), (7, -0.7)]


def test_one_pass_is_fed_all_but_the_last_answer():
    assert CANARY.fed_token_ids == (1, 9, 4)


@pytest.mark.parametrize("found", [SAME, [(4, -0.509), (7, -0.691)], [(4, -0.5), (2, -0.7)]])
def test_the_same_answer_passes(found):
    """Within noise; and where the reference itself stood between two, either token will do."""
    check_answer(CANARY, found)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([(5, -0.5), (7, -0.7)], "token 0 is 5, recorded was 4"),
        ([(4, -0.52), (7, -0.7)], "token 0 has log-probability"),
        ([(4, -0.5), (7, -0.8)], "token 1 has log-probability"),
        ([(4, math.nan), (7, -0.7)], "token 0 has log-probability nan"),
    ],
)
def test_another_answer_fails(found, text):
    with pytest.raises(CorruptCheckpoint, match=text):
        check_answer(CANARY, found)


@given(
    vocabulary=st.integers(1, 300_000),
    bos=st.none() | st.integers(-1, 300_000),
    context=st.integers(1, 4096),
)
def test_a_prompt_fits_every_model(vocabulary, bos, context):
    prompt = canary_prompt(vocabulary, bos, context)
    length = answer_length(len(prompt), context)
    assert prompt == canary_prompt(vocabulary, bos, context)
    assert all(0 <= token < vocabulary for token in prompt)
    assert 1 <= length <= ANSWER_TOKENS
    assert len(prompt) + length - 1 <= context


def test_it_is_written_and_read_as_json():
    assert parse_canary(canary_bytes(CANARY)) == CANARY


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        canary_bytes(Canary((), (SURE,))),
        canary_bytes(Canary((1,), ())),
        canary_bytes(Canary((-1,), (SURE,))),
        canary_bytes(Canary((1,), (SURE,), version=2)),
        canary_bytes(CANARY) + b" " * MAX_CANARY_BYTES + b"{",
    ],
)
def test_anything_else_is_refused(content):
    with pytest.raises(CorruptCheckpoint):
        parse_canary(content)
