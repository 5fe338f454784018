"""How the resume bench divides pauses; its cluster is measured, not tested."""

import pytest

from bench.resume import Stream, summarise


def stream(struck_s: float, next_s: float, owners: int = 2) -> Stream:
    return Stream((1, 2), owners, struck_unix_s=struck_s, next_token_unix_s=next_s)


def test_a_pause_is_divided_where_the_router_noticed() -> None:
    streams = [stream(10.0, 10.5), stream(20.0, 20.25)]
    found = summarise("engine killed", streams, changed=1, notices_s=[10.125, 20.125])
    assert (found.strikes, found.resumed, found.changed) == (2, 2, 1)
    assert (found.noticed_p50_s, found.next_token_p99_s) == (0.125, 0.375)
    assert (found.pause_p50_s, found.pause_max_s) == (0.25, 0.5)


def test_only_streams_whose_strike_was_noticed_count() -> None:
    early = stream(30.0, 30.5)  # its job had been handed back before
    whole = stream(10.0, 10.1, owners=1)
    streams = [stream(20.0, 20.5), early, whole]
    assert summarise("x", streams, changed=0, notices_s=[20.25, 29.0]).resumed == 1
    with pytest.raises(RuntimeError, match="more --tokens"):
        summarise("x", [early, whole], changed=0, notices_s=[29.0])
