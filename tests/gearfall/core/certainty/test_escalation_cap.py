"""The cap on escalations: it holds its share, gives way under load, and starves nobody."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.escalation_cap import (
    CUT,
    LEAST,
    MOST_SAVED,
    PERIOD_S,
    STEP,
    CapState,
    certain,
    gone_up,
    offered,
)

SHORT, LONG = 0.5, 1.5
TARGET = 1.0


def play(state: CapState, waits: list[float], every_s: float, start_s: float = 0.0) -> list[bool]:
    """Offer an answer every `every_s`; return which went up."""
    return [went for _, went in trace(state, waits, every_s, start_s)]


def trace(
    state: CapState, waits: list[float], every_s: float, start_s: float = 0.0
) -> list[tuple[CapState, bool]]:
    steps = []
    for at, wait_s in enumerate(waits):
        state = offered(state, wait_s, TARGET, start_s + at * every_s)
        went = state.is_open
        state = gone_up(state) if went else state
        steps.append((state, went))
    return steps


def test_all_go_up_while_the_queue_is_short():
    assert all(play(CapState(), [SHORT] * 100, 0.01))


def test_a_long_queue_cuts_the_share_once_a_period():
    steps = trace(CapState(changed_s=0.0), [LONG] * 4, PERIOD_S / 2, start_s=PERIOD_S / 2)
    shares = [state.share for state, _ in steps]
    assert shares == pytest.approx([1.0, CUT, CUT, CUT * CUT])


def test_the_share_comes_back_with_the_time_that_passed():
    state = CapState(share=LEAST, changed_s=0.0)
    assert offered(state, SHORT, TARGET, PERIOD_S * 4).share == pytest.approx(LEAST + 4 * STEP)
    assert offered(state, SHORT, TARGET, PERIOD_S * 1000).share == 1.0


@given(share=st.floats(LEAST, 1.0), count=st.integers(1, 300))
def test_the_share_holds_over_any_stretch(share, count):
    went = sum(play(CapState(share=share, credit=0.0, changed_s=0.0), [SHORT] * count, 0.0))
    assert abs(went - share * count) <= 1.0 + 1e-6


@given(waits=st.lists(st.floats(0, 10), max_size=200), every_s=st.floats(0.001, 2))
def test_nobody_is_starved_whatever_the_queue_does(waits, every_s):
    steps = trace(CapState(), waits, every_s)
    for state, _ in steps:
        assert LEAST <= state.share <= 1.0
        assert 0.0 <= state.credit < 2.0
    ups = [at for at, (_, went) in enumerate(steps) if went]
    assert all(later - earlier <= 1 / LEAST for earlier, later in pairwise([-1, *ups]))
    assert len(waits) - (ups[-1] if ups else -1) <= 1 / LEAST + 1


@given(start=st.floats(LEAST, 1.0), every_s=st.floats(0.05, 2))
def test_all_go_up_again_soon_after_the_queue_is_short(start, every_s):
    # The share grows by STEP a period; looks are at most a period and `every_s` apart.
    looks = int((1.0 / STEP + 1) * (PERIOD_S + every_s) / every_s) + 2
    steps = trace(CapState(share=start, changed_s=0.0), [SHORT] * (looks + 3), every_s)
    assert all(state.share == 1.0 for state, _ in steps[looks:])


@given(st.lists(st.sampled_from([SHORT, LONG]), min_size=1, max_size=60))
def test_a_longer_queue_never_lets_more_up(waits):
    longer = [LONG] * len(waits)
    assert sum(play(CapState(), longer, PERIOD_S)) <= sum(play(CapState(), waits, PERIOD_S))


PLANNED = 0.2


@pytest.mark.parametrize(
    ("before", "wait_s", "after"),
    [
        (1.0, LONG, PLANNED),  # what is more than planned, at once
        (0.25, LONG, PLANNED),
        (PLANNED, LONG, PLANNED * CUT),
        (LEAST * PLANNED, LONG, LEAST * PLANNED),
        (PLANNED, SHORT, PLANNED * (1 + 2 * STEP)),
        (0.999, SHORT, 1.0),
    ],
)
def test_a_plan_says_where_the_first_cut_goes(before, wait_s, after):
    state = CapState(share=before, changed_s=0.0)
    assert offered(state, wait_s, TARGET, 2 * PERIOD_S, PLANNED).share == pytest.approx(after)


@given(
    uncertain=st.lists(st.booleans(), min_size=1, max_size=400),
    share=st.floats(LEAST * PLANNED, 1.0),
)
def test_under_a_plan_the_share_is_of_all_answers(uncertain, share):
    """Never more than it has go up, whoever is certain, and of the uncertain ones no fewer."""
    state, went, refused = CapState(share=share, credit=0.0, changed_s=0.0), 0, 0
    for is_uncertain in uncertain:
        if not is_uncertain:
            state = certain(state)
            continue
        state = offered(state, SHORT, TARGET, 0.0, PLANNED)
        went, refused = went + state.is_open, refused + (not state.is_open)
        state = gone_up(state) if state.is_open else state
        assert 0.0 <= state.credit <= MOST_SAVED
    assert went <= share * len(uncertain) + 1e-6
    assert went + refused == sum(uncertain)
    assert went >= min(sum(uncertain), int(share * sum(uncertain) - 1e-6))


def test_as_many_as_planned_go_up_while_the_queue_is_too_long_for_more():
    state, went = CapState(share=PLANNED, credit=1.0, changed_s=0.0), 0
    for number in range(1000):
        if number % 5 == 0:
            state = offered(state, LONG, TARGET, 0.1, PLANNED)
            went += state.is_open
            state = gone_up(state) if state.is_open else state
        else:
            state = certain(state)
    assert went == 200
