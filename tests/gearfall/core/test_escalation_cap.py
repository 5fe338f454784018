"""The cap on escalations: it holds its share, gives way under load, and starves nobody."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.escalation_cap import CUT, LEAST, PERIOD_S, STEP, CapState, gone_up, offered

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
