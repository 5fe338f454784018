import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.scheduling.prefetching.forecast import (
    EWMA_WINDOW_S,
    SEASON_SLOTS,
    ArrivalHistory,
    Forecast,
    note_arrivals,
    use_probability,
)

SEASON_S = 9600.0
SLOT_S = SEASON_S / SEASON_SLOTS
BEGIN_S = 1000 * SEASON_S


def history(*arrivals):
    """Of (time since BEGIN_S, jobs)."""
    known = ArrivalHistory()
    for at_s, jobs in arrivals:
        known = note_arrivals(known, jobs, BEGIN_S + at_s, season_s=SEASON_S)
    return known


def use(known, forecast, horizon_s, at_s):
    return use_probability(known, forecast, horizon_s, BEGIN_S + at_s, season_s=SEASON_S)


@pytest.mark.parametrize("forecast", Forecast)
def test_what_nobody_asked_for_is_not_expected(forecast):
    assert use(ArrivalHistory(), forecast, 300.0, 0.0) == 0.0
    assert use(history((0.0, 0)), forecast, 300.0, 10.0) == 0.0
    assert use(history((0.0, 5)), forecast, 0.0, 10.0) == 0.0


def test_the_rate_fades():
    known = history((0.0, 6))
    at_once = 1 - math.exp(-6 * 60.0 / EWMA_WINDOW_S)
    assert use(known, Forecast.EWMA, 60.0, 0.0) == pytest.approx(at_once)
    later = 1 - math.exp(-6 * 60.0 / EWMA_WINDOW_S / math.e)
    assert use(known, Forecast.EWMA, 60.0, EWMA_WINDOW_S) == pytest.approx(later)


@pytest.mark.parametrize(
    ("horizon_s", "at_s", "expected"),
    [
        (SLOT_S, SEASON_S, 4.0),
        (SLOT_S / 2, SEASON_S, 2.0),
        (SLOT_S, SEASON_S - SLOT_S / 2, 2.0),
        (SLOT_S, SEASON_S + 1.5 * SLOT_S, 0.0),
        (2 * SLOT_S, SEASON_S - SLOT_S, 4.0),
        (3 * SLOT_S, SEASON_S + 5 * SLOT_S, 8.0),
        (SLOT_S, 2 * SEASON_S, 0.0),
        (SLOT_S, SLOT_S, 0.0),
    ],
)
def test_what_came_a_season_ago_comes_again(horizon_s, at_s, expected):
    known = history((1.0, 3), (SLOT_S - 1.0, 1), (7.5 * SLOT_S, 8))
    found = use(known, Forecast.SEASONAL, horizon_s, at_s)
    assert found == pytest.approx(1 - math.exp(-expected))


def test_of_the_season_the_newest_counts():
    known = history((1.0, 50), (SEASON_S + 1.0, 2))
    assert use(known, Forecast.SEASONAL, SLOT_S, 2 * SEASON_S) == pytest.approx(1 - math.exp(-2))


def test_a_clock_is_recognised_by_its_silences():
    known = history(*((600.0 * n, 2) for n in range(20)))
    last_s = 600.0 * 19
    soon = use(known, Forecast.GAPS, 60.0, last_s + 30.0)
    due = use(known, Forecast.GAPS, 200.0, last_s + 480.0)
    assert soon < 0.1
    assert due > 0.7
    assert use(known, Forecast.GAPS, 60.0, last_s + 3000.0) < 0.1


def test_before_a_whole_season_the_blend_is_that_of_the_silences():
    arrivals = [(600.0 * n, 2) for n in range(20)]
    young, old = history(*arrivals[:10]), history(*arrivals)
    assert 600.0 * 9 < SEASON_S < 600.0 * 19
    assert use(young, Forecast.BLEND, 200.0, 5500.0) == use(young, Forecast.GAPS, 200.0, 5500.0)
    parts = [use(old, each, 200.0, 11500.0) for each in (Forecast.GAPS, Forecast.SEASONAL)]
    assert use(old, Forecast.BLEND, 200.0, 11500.0) == pytest.approx(sum(parts) / 2)


_arrivals = st.lists(st.tuples(st.floats(0.0, 4 * SEASON_S), st.integers(0, 9)), max_size=25)


@given(_arrivals, st.sampled_from(Forecast), st.floats(0.0, 5000.0), st.floats(0.0, 3 * SEASON_S))
def test_a_probability_it_is_and_longer_horizons_are_likelier(arrivals, forecast, horizon_s, more):
    known = history(*sorted(arrivals))
    at_s = max((at for at, _ in arrivals), default=0.0) + more
    short = use(known, forecast, horizon_s, at_s)
    long = use(known, forecast, 2 * horizon_s, at_s)
    assert 0.0 <= short <= long + 1e-12
    assert long <= 1.0


@given(_arrivals)
def test_a_history_has_constant_size_and_its_last_slots_are_true(arrivals):
    arrivals = sorted(arrivals)
    known = history(*arrivals)
    assert len(known.season) == SEASON_SLOTS
    newest = math.floor(known.last_unix_s / SLOT_S)
    for slot in range(newest - SEASON_SLOTS + 1, newest + 1):
        came = sum(jobs for at_s, jobs in arrivals if math.floor((BEGIN_S + at_s) / SLOT_S) == slot)
        kept = known.slot_jobs if slot == newest else known.season[slot % SEASON_SLOTS]
        if known.last_unix_s:
            assert kept == came
