"""Figures over rounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measuring.spread import rotated, spread


@given(st.lists(st.text(), min_size=1, unique=True))
def test_every_target_is_first_once_in_as_many_rounds(targets: list[str]) -> None:
    orders = [rotated(targets, turn) for turn in range(len(targets))]
    assert sorted(order[0] for order in orders) == sorted(targets)
    assert all(sorted(order) == sorted(targets) for order in orders)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_a_spread_holds_every_value(values: list[float]) -> None:
    found = spread(values)
    assert (found.low, found.high) == (min(values), max(values))
    assert found.low <= found.median <= found.high


def test_no_value_has_no_spread() -> None:
    with pytest.raises(ValueError, match="no value"):
        spread([])
