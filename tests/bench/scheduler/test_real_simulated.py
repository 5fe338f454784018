"""The real bench's cluster as it is simulated: the same memory, loads and requests."""

from dataclasses import replace

import pytest

from bench.scheduler.real_simulated import Speeds, scenario_of
from bench.scheduler.real_traces import TRACES
from gearfall.core.tiers import Tier
from gearfall.simulation.fleet.scenario import simulate

SPEEDS = Speeds(start_s=0.1, step_s=0.014)
TRACE = replace(TRACES["skewed"], duration_s=20.0)


def test_a_start_takes_what_the_real_ones_do():
    run = simulate(scenario_of(TRACE, SPEEDS, 1), "random")
    first = [each.first_token_s for each in run.outcomes]
    assert min(first) < SPEEDS.start_s, "some find their model running"
    assert max(first) > TRACE.shape.load_s + SPEEDS.start_s, "some read it from a disk"


def test_starts_are_known_before_the_first_request():
    scenario = scenario_of(TRACE, SPEEDS, 1)
    known = scenario.costs.fixed
    for model in TRACE.shape.names:
        for node in scenario.site.nodes:
            for tier in (Tier.SSD, Tier.DRAM):
                assert known[model, tier, node.node_id] == pytest.approx((SPEEDS.start_s,))
    errors = simulate(scenario, "locality").start_errors
    assert errors
    assert max(errors) < 0.25


def test_nobody_waits_for_a_disk_where_all_is_in_memory():
    scenario = scenario_of(TRACE, SPEEDS, 1, has_disk=False)
    assert simulate(scenario, "random").tally.ssd_bytes == 0
    assert scenario.requests == scenario_of(TRACE, SPEEDS, 1).requests
