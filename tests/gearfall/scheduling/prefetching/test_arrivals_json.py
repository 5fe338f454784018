"""Histories that one leader leaves for the next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.scheduling.prefetching.arrivals_json import (
    MAX_BYTES,
    arrivals_from_json,
    arrivals_to_json,
)
from gearfall.scheduling.prefetching.forecast import (
    DAY_S,
    ArrivalHistory,
    Forecast,
    note_arrivals,
    use_probability,
)

GAPS_S = st.lists(st.floats(1.0, 90_000.0), max_size=40)


def history(gaps_s: list[float]) -> ArrivalHistory:
    found, at_unix_s = ArrivalHistory(), 1_700_000_000.0
    for gap_s in gaps_s:
        at_unix_s += gap_s
        found = note_arrivals(found, 1, at_unix_s)
    return found


@given(GAPS_S)
def test_the_next_leader_expects_what_this_one_did(gaps_s: list[float]) -> None:
    mine = history(gaps_s)
    text = arrivals_to_json({ModelName("m"): mine})
    theirs = arrivals_from_json(text)[ModelName("m")]
    assert (theirs.first_unix_s, theirs.last_unix_s) == (mine.first_unix_s, mine.last_unix_s)
    now_unix_s = mine.last_unix_s + 100.0
    for forecast in Forecast:
        expected = use_probability(mine, forecast, 300.0, now_unix_s, season_s=DAY_S)
        found = use_probability(theirs, forecast, 300.0, now_unix_s, season_s=DAY_S)
        assert found == pytest.approx(expected, abs=1e-3)
    assert arrivals_to_json({ModelName("m"): theirs}) == text


def test_of_too_many_models_those_that_were_wanted_last_are_kept() -> None:
    busy = history([float(3**power) for power in range(10)] * 4)
    many = {ModelName(f"{'m' * 400}{number}"): busy for number in range(3_000)}
    last = note_arrivals(busy, 1, busy.last_unix_s + 5.0)
    text = arrivals_to_json({**many, ModelName("last"): last})
    assert len(text) <= MAX_BYTES
    kept = arrivals_from_json(text)
    assert next(iter(kept)) == "last"
    assert 100 < len(kept) < 3_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[[1]]",
        '[["m", -1, 0, 0, [], 0, 0, []]]',
        '[["m", 0, 0, 0, [[99, 1]], 0, 0, []]]',
        '[["m", 0, 0, 0, [[0, 1e300]], 0, 0, []]]',
        '[["m", 0, 0, 0, [], 0, 0, [[-1, 1]]]]',
        "[" * 5000,
    ],
)
def test_what_is_no_such_document_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        arrivals_from_json(text)
