"""Simulated time goes forward, and what is due at once happens in the order of planning."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.simulation.agenda import Agenda


@given(st.lists(st.floats(0, 100), max_size=30))
def test_events_happen_in_order_of_time_then_of_planning(delays):
    agenda = Agenda()
    happened: list[tuple[float, int]] = []

    def happen(number: int) -> None:
        happened.append((agenda.now_s, number))

    for number, delay in enumerate(delays):
        agenda.after(delay, partial(happen, number))
    while agenda.step():
        pass
    assert happened == sorted(happened)
    assert len(happened) == agenda.events == len(delays)


def test_nothing_is_planned_for_the_past():
    agenda = Agenda(5.0)
    with pytest.raises(AssertionError, match="past"):
        agenda.at(4.0, lambda: None)
