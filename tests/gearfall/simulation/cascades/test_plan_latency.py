"""A whole plan, built over the simulator: what it promises is what a replay gives."""

from dataclasses import replace

import numpy as np
import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import plan_text
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.core.ids import ModelName
from gearfall.gears.placement import Host, Placeable
from gearfall.gears.plan_build import PlanInputs, Target, build_plan
from gearfall.simulation.cascades.answers import Answer
from gearfall.simulation.cascades.plan_latency import PlanLatency, ServedModel, tokens_per_s
from gearfall.simulation.cascades.step_engine import StepSpeed
from tests.gearfall.gears.answers import family

GB = 10**9
COUNT = 1500
PROMPT, OUTPUT = 20, 10
SERVED = {
    "m0": ServedModel(StepSpeed(((1, 0.002), (16, 0.0035)), 1e-5), 16),
    "m1": ServedModel(StepSpeed(((1, 0.01), (16, 0.0175)), 5e-5), 16),
    "m2": ServedModel(StepSpeed(((1, 0.04), (16, 0.07)), 2e-4), 16),
}
TOKENS = dict.fromkeys(SERVED, float(PROMPT + OUTPUT))


def hosts(count=4):
    return tuple(Host(f"w{n}", f"n{n // 2}", 10 * GB, 3) for n in range(count))


def inputs(target: Target, *, loads=(100.0, 1000.0, 8000.0), workers=4) -> PlanInputs:
    speeds = {name: tokens_per_s(served, PROMPT, OUTPUT) for name, served in SERVED.items()}
    return PlanInputs(
        name="chat",
        version=3,
        made_unix_s=1.0,
        target=target,
        loads=loads,
        answers=tuple(family(COUNT, seed=9)),
        tokens=TOKENS,
        order=np.random.default_rng(1).permutation(COUNT),
        models=tuple(
            Placeable(name, size * GB, {host.name: speeds[name] for host in hosts(workers)})
            for name, size in (("m0", 1), ("m1", 3), ("m2", 6))
        ),
        hosts=hosts(workers),
        digests=dict.fromkeys(SERVED, "d" * 32),
        cost_unit="FLOP",
        assumptions=("a test",),
    )


@pytest.fixture(scope="module")
def latency() -> PlanLatency:
    models = family(COUNT, seed=9)
    queries = [
        {
            ModelName(m.model): Answer(
                PROMPT, OUTPUT, float(m.certainty[at]), float(m.correct[at]), float(m.cost[at])
            )
            for m in models
        }
        for at in range(COUNT)
    ]
    return PlanLatency(queries, SERVED, TOKENS, requests=120)


def test_quality_gives_way_to_load_and_every_promise_is_kept(latency):
    plan = build_plan(inputs(Target(p95_s=1.5)), latency)
    assert parse_plan(plan_text(plan)) == plan
    qualities = [gear.promise.quality for gear in plan.gears]
    assert qualities == sorted(qualities, reverse=True)
    assert qualities[0] > qualities[-1]
    assert all(0.0 < gear.promise.p95_s <= 1.5 for gear in plan.gears)
    assert all(gear.promise.quality_bound <= gear.promise.quality for gear in plan.gears)
    assert [variant.lost_node for variant in plan.variants] == ["n0", "n1"]


def test_a_quality_target_is_kept_at_every_load(latency):
    plan = build_plan(inputs(Target(quality=0.6), loads=(100.0, 2000.0)), latency)
    assert all(gear.promise.quality_bound >= 0.6 for gear in plan.gears)
    assert plan.target == "quality >= 0.6 with delta 0.05"


@pytest.mark.parametrize(
    ("target", "loads", "says"),
    [
        (Target(quality=0.99), (100.0,), "certify a quality of 0.[0-9]+ at most"),
        (Target(p95_s=0.001), (100.0,), "cheapest cascade that may be used p95 is"),
        (Target(), (1e7,), "would be used"),
        (Target(), (), "rising, above 0"),
        (Target(), (100.0, 50.0), "rising, above 0"),
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_distance(latency, target, loads, says):
    with pytest.raises(InvalidRequest, match=says):
        build_plan(inputs(target, loads=loads), latency)


def test_a_node_that_can_not_be_lost_is_named(latency):
    tight = replace(inputs(Target(quality=0.7), loads=(5000.0,)), hosts=hosts(4)[:3])
    plan = build_plan(tight, latency)
    assert plan.variants == ()
    for node in ("n0", "n1"):
        assert any(f"without node {node}" in line for line in plan.assumptions)


def test_same_inputs_same_plan(latency):
    first, again = (build_plan(inputs(Target(p95_s=1.5)), latency) for _ in range(2))
    assert first == again
