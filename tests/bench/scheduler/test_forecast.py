"""The forecast's bench: fleets out of a trace, and what its figures mean."""

import numpy as np
import pytest

from bench.scheduler.forecast import make_models, replay_all
from bench.scheduler.forecast_fleet import AZURE, KINDS, TRACES, make_arrivals, read_times
from bench.scheduler.forecast_replay import Replay, Site
from gearfall.core.ids import ModelName
from gearfall.scheduling.prefetching.forecast import Forecast

NAMES = [ModelName(f"model-{n}") for n in range(8)]


def times(count=400, until_s=1800.0):
    return np.sort(np.random.default_rng(3).random(count)) * until_s


@pytest.mark.parametrize("kind", KINDS)
def test_a_fleet_has_every_arrival_of_every_day_and_is_the_same_again(kind):
    made, day_s = make_arrivals(times(), NAMES, kind=kind, days=3, seed=5)
    assert day_s == 1800.0
    assert made == make_arrivals(times(), NAMES, kind=kind, days=3, seed=5)[0]
    assert made != make_arrivals(times(), NAMES, kind=kind, days=3, seed=6)[0]
    at_s = [each.at_s for each in made]
    assert at_s == sorted(at_s)
    by_clock = NAMES[4:] if kind == "timers" else []
    of_trace = [each for each in made if each.model not in by_clock]
    assert len(of_trace) == 3 * 400
    assert {each.model for each in made} <= set(NAMES)
    assert {each.model for each in made} >= set(by_clock)


def test_days_of_a_daily_fleet_are_alike_and_not_the_same():
    made, day_s = make_arrivals(times(4000), NAMES, kind="daily", days=2, seed=5)
    first, second = (
        {(each.at_s % day_s, each.model) for each in made if each.at_s // day_s == day}
        for day in (0, 1)
    )
    shared = len(first & second) / len(first)
    flat, _ = make_arrivals(times(4000), NAMES, kind="flat", days=2, seed=5)
    a, b = (
        {(each.at_s % day_s, each.model) for each in flat if each.at_s // day_s == day}
        for day in (0, 1)
    )
    assert 0.0 < len(a & b) / len(a) < shared < 1.0


@pytest.mark.parametrize("policy", [None, *Forecast])
def test_pools_are_never_overfull_and_every_start_is_counted(policy):
    site = Site(nodes=2, pool_bytes=30 * 10**9)
    models = make_models(8, site, 1)
    arrivals, day_s = make_arrivals(times(), NAMES, kind="timers", days=3, seed=5)
    replay = Replay(site, models, policy, day_s=day_s)
    tally = replay.run(arrivals)
    assert all(replay._used(node) <= site.pool_bytes for node in replay.nodes.values())
    assert tally.requests == sum(each.at_s >= day_s for each in arrivals)
    assert 0 < tally.starts <= tally.requests
    assert tally.from_pool <= tally.starts
    assert tally.prefetched_used <= min(tally.prefetched, tally.from_pool)
    assert (tally.prefetched > 0) is (policy is not None)


def test_the_blend_helps_a_fleet_of_a_real_trace():
    if not TRACES.is_dir():
        pytest.skip(f"no traces at {TRACES}")
    name = AZURE[1]
    seconds = read_times(name)
    assert len(seconds) == 8819
    assert seconds[0] == 0.0
    rows = replay_all(seconds, trace=name, kind="daily", models=64, days=2, seed=1)
    by_policy = {row.policy: row for row in rows}
    assert by_policy["blend"].from_ssd < by_policy["none"].from_ssd
