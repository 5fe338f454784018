"""The judgement about a worker's connection, row by row and over any history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import WorkerId
from services.scheduler.reachability import (
    REACHABLE,
    TRANSITIONS,
    LinkEvent,
    LinkState,
    next_state,
    note_absent,
)

EVENTS = st.lists(st.sampled_from(LinkEvent), max_size=20)


def after(*events, start=LinkState.DOUBTFUL):
    state = start
    for event in events:
        state = next_state(state, event)
    return state


@pytest.mark.parametrize("state", LinkState)
@pytest.mark.parametrize("event", LinkEvent)
def test_what_the_table_does_not_list_changes_nothing(state, event):
    assert next_state(state, event) is TRANSITIONS.get((state, event), state)


def test_a_connection_that_is_made_again_at_once_is_no_loss():
    seen = [after(*[LinkEvent.SERVES, LinkEvent.BROKE] * 3, start=LinkState.UP)]
    assert seen == [LinkState.DOUBTFUL]
    assert after(LinkEvent.SERVES, start=seen[0]) is LinkState.UP


@given(EVENTS)
def test_it_takes_two_breaks_in_a_row_to_lose_a_worker_that_was_up(events):
    state = LinkState.UP
    for before, event in zip([LinkEvent.SERVES, *events], events, strict=False):
        was_reachable = state in REACHABLE
        state = next_state(state, event)
        if was_reachable and state not in REACHABLE:
            assert (before, event) == (LinkEvent.BROKE, LinkEvent.BROKE) or (
                event is LinkEvent.BROKE
            )
            assert state is LinkState.DOWN


@given(EVENTS)
def test_a_lost_worker_counts_again_only_after_it_was_steady(events):
    state = after(*events, start=LinkState.DOWN)
    if LinkEvent.STEADY not in events:
        assert state not in REACHABLE


def test_absence_counts_from_the_first_look_and_is_forgotten_on_return():
    first = note_absent({}, [WorkerId("a"), WorkerId("b")], 10.0)
    second = note_absent(first, [WorkerId("b"), WorkerId("c")], 15.0)
    assert second == {"b": 10.0, "c": 15.0}
    assert note_absent(second, [WorkerId("a")], 20.0) == {"a": 20.0}
