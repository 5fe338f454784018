import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName, RouterId
from gearfall.core.records import LoadRecord
from gearfall.scheduling.scaling.autoscaler_load import (
    PEAK_WINDOW_S,
    SHORT_WINDOW_S,
    STABLE_WINDOW_S,
    ModelLoad,
    advance_load,
    peak_changes_at,
    peak_jobs,
    short_jobs,
    stable_below_at,
    stable_jobs,
)


def record(jobs, *, arrived=0, at=0.0, router="router-a"):
    return LoadRecord(ModelName("small"), RouterId(router), at, arrived, 0, 0, jobs)


def played(*steps):
    """Advance through (time, jobs), all at one router that begins with the first."""
    load = ModelLoad()
    for at, jobs in steps:
        load = advance_load(load, [record(jobs, arrived=jobs, at=at)], at)
    return load


def test_nothing_came_is_the_empty_load():
    assert advance_load(ModelLoad(), (), 50.0) == ModelLoad()


def test_an_average_closes_in_on_what_runs():
    load = played((100.0, 8))
    assert short_jobs(load, 100.0) == 0.0
    assert short_jobs(load, 100.0 + SHORT_WINDOW_S) == pytest.approx(8 * (1 - 1 / math.e))
    assert stable_jobs(load, 100.0 + STABLE_WINDOW_S) == pytest.approx(8 * (1 - 1 / math.e))


def test_a_leader_that_comes_to_a_busy_model_takes_it_as_usual():
    load = advance_load(ModelLoad(), [record(5, arrived=900, at=100.0)], 100.0)
    assert (short_jobs(load, 100.0), stable_jobs(load, 100.0)) == (5.0, 5.0)
    assert load.arrived_jobs == 5


def test_a_job_that_ended_before_it_was_told_has_come_all_the_same():
    load = advance_load(ModelLoad(), [record(0, arrived=900, at=100.0)], 101.0)
    assert (load.arrived_jobs, load.arrivals.last_unix_s) == (1, 100.0)
    old = advance_load(ModelLoad(), [record(0, arrived=900, at=10.0)], 100.0)
    assert (old.arrived_jobs, old.arrivals.last_unix_s) == (0, 0.0)


def test_routers_are_added_up_and_one_that_left_is_not():
    both = [record(2, arrived=2), record(3, arrived=3, router="router-b")]
    load = advance_load(ModelLoad(), both, 10.0)
    assert (load.jobs, load.arrived_jobs) == (5, 5)
    load = advance_load(load, both[:1], 20.0)
    assert (load.jobs, load.arrived_jobs) == (2, 5)
    assert advance_load(load, (), 30.0).jobs == 0


@pytest.mark.parametrize(
    ("totals", "arrived"), [((4, 4), 4), ((4, 9), 9), ((4, 9, 2), 11), ((4, 9, 2, 3), 12)]
)
def test_arrivals_are_counted_once_though_a_router_begins_anew(totals, arrived):
    load = ModelLoad()
    for place, total in enumerate(totals):
        load = advance_load(load, [record(min(4, total), arrived=total)], 10.0 + place)
    assert load.arrived_jobs == arrived


def test_a_record_that_is_seen_twice_counts_once():
    load = played((10.0, 3), (11.0, 3), (12.0, 3))
    assert (load.arrived_jobs, load.arrivals.last_unix_s) == (3, 10.0)


def test_time_that_goes_back_changes_no_average():
    load = played((100.0, 4), (160.0, 4))
    back = advance_load(load, [record(4, arrived=4, at=130.0)], 130.0)
    assert back.at_unix_s == 160.0
    assert back.stable_jobs == load.stable_jobs


def test_a_peak_is_remembered_for_a_window_and_then_sinks():
    load = played((1000.0, 0), (1010.0, 10), (1040.0, 0))
    peak = short_jobs(load, 1040.0)
    assert peak > 9.9
    assert peak_jobs(load, 1040.0) == pytest.approx(peak)
    assert peak_jobs(load, 1059.0 + PEAK_WINDOW_S) == pytest.approx(peak)
    assert peak_jobs(load, 1000.0 + 2 * PEAK_WINDOW_S) < 0.5
    assert peak_changes_at(load, 1041.0) == 1000.0 + PEAK_WINDOW_S
    assert peak_changes_at(played((1000.0, 0), (1010.0, 10)), 1041.0) is None


def test_when_the_average_comes_down_is_foreseen():
    load = played((100.0, 10), (600.0, 1))
    at = stable_below_at(load, 4.0, 600.0)
    assert at is not None
    assert stable_jobs(load, at) == pytest.approx(4.0)
    assert stable_below_at(load, 0.5, 600.0) is None
    assert stable_below_at(load, 99.0, 600.0) == 600.0


_steps = st.lists(st.tuples(st.floats(0.01, 90.0), st.integers(0, 30)), min_size=1, max_size=12)


@given(_steps)
def test_the_averages_are_the_integrals_and_the_peak_is_their_largest(steps):
    """Held against small steps of the differential equation's exact solution."""
    load, now, jobs = ModelLoad(), 1000.0, 0
    short = stable = 0.0
    seen: list[tuple[float, float]] = [(now, 0.0)]
    load = advance_load(load, [record(0)], now)
    for elapsed, new_jobs in steps:
        for part in range(1, 9):
            at = now + elapsed * part / 8
            seen.append((at, jobs + (short - jobs) * math.exp(-(at - now) / SHORT_WINDOW_S)))
        short = jobs + (short - jobs) * math.exp(-elapsed / SHORT_WINDOW_S)
        stable = jobs + (stable - jobs) * math.exp(-elapsed / STABLE_WINDOW_S)
        now += elapsed
        jobs = new_jobs
        load = advance_load(load, [record(jobs, arrived=jobs, at=now)], now)
    assert short_jobs(load, now) == pytest.approx(short, abs=1e-9)
    assert stable_jobs(load, now) == pytest.approx(stable, abs=1e-9)
    peak = peak_jobs(load, now)
    recent = max(value for at, value in seen if at >= now - PEAK_WINDOW_S)
    remembered = max(value for at, value in seen if at >= now - 2 * PEAK_WINDOW_S)
    assert peak >= recent - 1e-9
    crossing = max(
        (value for at, value in seen if at >= now - 2 * PEAK_WINDOW_S - 90.0), default=0.0
    )
    assert peak <= max(remembered, crossing) + 1e-9


@given(_steps, st.floats(0.0, 300.0))
def test_looking_later_is_the_same_as_advancing_there(steps, later_s):
    now, load = 1000.0, ModelLoad()
    for elapsed, jobs in steps:
        now += elapsed
        load = advance_load(load, [record(jobs, arrived=jobs, at=now)], now)
    at = now + later_s
    moved = advance_load(load, [record(load.jobs, arrived=load.jobs, at=now)], at)
    for look in (short_jobs, stable_jobs, peak_jobs):
        assert look(moved, at) == pytest.approx(look(load, at), abs=1e-9)
