"""A plan at work: its gears follow the load, and every request is somewhere in the picture."""

from dataclasses import replace
from itertools import pairwise

import pytest

from gearfall.core.profile import Profile
from gearfall.simulation.cascades.plan_day import made_up_day, moments, run_day, scaled_trace
from gearfall.simulation.cascades.profile_plan import mean_tokens, plan_from_profile
from tests.gearfall.simulation.cascades.test_profile_plan import HOSTS, REQUEST, profile

__all__ = ["profile"]


@pytest.fixture(scope="module")
def plan(profile: Profile):
    return plan_from_profile(profile, HOSTS, replace(REQUEST, loads=(200.0, 400.0)))


def test_gears_rise_and_fall_with_a_day(plan, profile):
    times = made_up_day(plan, profile, cv=1.0)
    assert all(a <= b for a, b in pairwise(times))
    run = run_day(plan, profile, HOSTS, times)
    assert len(run.answered) == len(times)
    seen = moments(run, plan, profile, count=40)
    peak = max(seen, key=lambda each: each.load)
    assert peak.load > plan.gears[-1].max_load * 0.9
    assert seen[0].load < peak.load / 2
    assert {each.gear for each in seen} == {0, 1}
    assert peak.gear == 1
    tokens = mean_tokens(profile.model(plan.gears[0].stages[0].model))
    length_s = seen[1].at_s - seen[0].at_s
    assert sum(each.load for each in seen) * length_s / tokens == pytest.approx(len(times))


def test_a_trace_keeps_its_shape_and_brings_half_the_highest_load(plan, profile):
    times = [100.0 + (n // 10) * 7.0 + 0.01 * (n % 10) for n in range(500)]
    scaled = scaled_trace(plan, profile, times)
    stretch = scaled[-1] / (times[-1] - times[0])
    assert scaled == pytest.approx([(each - times[0]) * stretch for each in times])
    tokens = mean_tokens(profile.model(plan.gears[0].stages[0].model))
    assert len(times) * tokens / scaled[-1] == pytest.approx(plan.gears[-1].max_load / 2)


def test_the_same_day_twice(plan, profile):
    first, again = (made_up_day(plan, profile, cv=2.0) for _ in range(2))
    assert first == again
    assert run_day(plan, profile, HOSTS, first) == run_day(plan, profile, HOSTS, first)
