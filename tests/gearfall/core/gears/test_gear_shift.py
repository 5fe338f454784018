from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.gears.gear_plan import Gear, Promise
from gearfall.core.gears.gear_shift import GearState, LoadSample, ShiftPolicy, shift
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage

POLICY = ShiftPolicy()
PROMISE = Promise(0.9, 0.0, 0.1, 0, 1.0, 1.0, (1.0,))
GEARS = tuple(Gear(load, (Stage(ModelName("m")),), PROMISE) for load in (100.0, 1000.0, 10_000.0))
STEP_S = 0.1


def run(state: GearState, seconds: float, rate: float, **sample) -> GearState:
    """Feed a steady load, ten samples a second."""
    for _ in range(round(seconds / STEP_S)):
        at_s = state.at_s + STEP_S
        seen = LoadSample(at_s, rate * STEP_S, **({"queued_tokens": 0.0} | sample))
        state = shift(state, seen, GEARS, POLICY)
    return state


def test_a_burst_that_waits_shifts_up_with_its_first_sample():
    start = GearState(0, 0.0)
    burst = LoadSample(STEP_S, 500.0, queued_tokens=4000.0)
    assert shift(start, burst, GEARS, POLICY).gear == 2


def test_a_lasting_rate_shifts_up_within_a_smoothing_time():
    state = run(GearState(0, 0.0, rate=50.0), POLICY.smoothing_s, 800.0)
    assert state.gear == 1
    assert state.rate == pytest.approx(800.0, rel=0.1)


def test_down_only_after_the_dwell():
    high = GearState(2, 0.0, rate=5000.0)
    assert run(high, POLICY.dwell_s * 0.9, 10.0).gear == 2
    assert run(high, POLICY.dwell_s * 3.0, 10.0).gear == 0


def test_not_down_while_work_waits():
    high = GearState(2, 0.0, rate=50.0)
    waiting = POLICY.short_queue_s * GEARS[2].max_load * 1.2
    assert run(high, 30.0, 10.0, queued_tokens=waiting).gear == 2


def test_down_no_further_than_the_dwell_saw():
    state = run(GearState(2, 0.0, rate=600.0), POLICY.dwell_s * 0.6, 600.0)
    state = run(state, POLICY.dwell_s * 0.5, 10.0)
    assert state.gear == 1


def test_full_memory_shifts_one_up():
    idle = GearState(0, 0.0, rate=10.0)
    assert run(idle, STEP_S, 10.0, kv_share=0.99).gear == 1
    assert run(replace(idle, gear=2), STEP_S, 10.0, kv_share=0.99).gear == 2


def test_memory_that_stays_full_shifts_again_only_after_the_shift_had_time_to_show():
    state = run(GearState(0, 0.0, rate=10.0), POLICY.kv_settle_s * 0.9, 10.0, kv_share=0.99)
    assert state.gear == 1
    assert run(state, POLICY.kv_settle_s * 0.3, 10.0, kv_share=0.99).gear == 2


def test_full_memory_never_lets_the_gear_go_down():
    assert run(GearState(1, 0.0, rate=10.0), 3 * POLICY.dwell_s, 10.0, kv_share=0.93).gear == 2


def test_a_plan_with_fewer_gears_takes_over():
    assert shift(GearState(2, 0.0), LoadSample(1.0, 0.0, 0.0), GEARS[:1], POLICY).gear == 0


_samples = st.lists(
    st.builds(
        LoadSample,
        st.floats(-10.0, 100.0),
        st.floats(0.0, 1e6),
        st.floats(0.0, 1e6),
        st.floats(0.0, 1.0),
    ),
    max_size=40,
)


@given(_samples, st.integers(1, 3))
def test_whatever_comes_the_gear_is_one_of_the_plan_and_time_never_runs_back(samples, count):
    state = GearState(0, 0.0)
    for sample in samples:
        after = shift(state, sample, GEARS[:count], POLICY)
        assert 0 <= after.gear < count
        assert after.at_s >= state.at_s
        assert after.rate >= 0.0
        if after.gear < state.gear:
            assert state.lower_since_s is not None
            assert after.at_s - state.lower_since_s >= POLICY.dwell_s
        state = after
