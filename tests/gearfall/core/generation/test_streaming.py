"""Streaming modes: what a request gets, and what is refused."""

import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.streaming import (
    MAX_HOLD_TOKENS,
    Streaming,
    StreamMode,
    check_hold_tokens,
    parse_stream_mode,
    resolve_streaming,
)

EARLY_8 = Streaming(StreamMode.EARLY, 8)


@pytest.mark.parametrize(
    ("default", "mode", "hold_tokens", "expected"),
    [
        (Streaming(), None, None, Streaming()),
        (EARLY_8, None, None, EARLY_8),
        (EARLY_8, None, 3, Streaming(StreamMode.EARLY, 3)),
        (EARLY_8, StreamMode.DRAFT, None, Streaming(StreamMode.DRAFT, 8)),
        (Streaming(), StreamMode.EARLY, 5, Streaming(StreamMode.EARLY, 5)),
    ],
)
def test_a_request_overrides_its_deployment(default, mode, hold_tokens, expected):
    assert resolve_streaming(default, mode, hold_tokens) == expected


@pytest.mark.parametrize(
    ("default", "mode"),
    [(Streaming(), None), (EARLY_8, StreamMode.DRAFT), (EARLY_8, StreamMode.BUFFER)],
)
def test_tokens_to_hold_back_for_nothing_are_refused(default, mode):
    with pytest.raises(InvalidRequest, match="has no effect") as refused:
        resolve_streaming(default, mode, 4)
    assert refused.value.param == "hold_tokens"


def test_unknown_modes_are_refused_with_the_known_ones():
    assert parse_stream_mode("early") is StreamMode.EARLY
    with pytest.raises(InvalidRequest, match="buffer, early, draft") as refused:
        parse_stream_mode("eager")
    assert refused.value.param == "stream_mode"


@pytest.mark.parametrize("hold_tokens", [-1, 0, MAX_HOLD_TOKENS + 1])
def test_hold_tokens_have_a_range(hold_tokens):
    check_hold_tokens(1)
    check_hold_tokens(MAX_HOLD_TOKENS)
    with pytest.raises(InvalidRequest, match="between 1 and 4096"):
        check_hold_tokens(hold_tokens)
