"""The sub-problems' errors, one by one: what each of them changes in the plan."""

from dataclasses import replace

import numpy as np
import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.gears.placement import Host, Placeable
from gearfall.gears.plan_build import PlanInputs, Target, build_plan
from gearfall.gears.starts import StartTerms, Warmth
from tests.gearfall.gears.answers import family

GB = 10**9
COUNT = 2000
SPEEDS = {"m0": 10_000.0, "m1": 2_000.0, "m2": 500.0}
ANSWERS = tuple(family(COUNT, seed=9))
INPUTS = PlanInputs(
    name="chat",
    version=1,
    made_unix_s=1.0,
    target=Target(),
    loads=(50.0, 400.0),
    answers=ANSWERS,
    tokens=dict.fromkeys(SPEEDS, 30.0),
    order=np.random.default_rng(1).permutation(COUNT),
    models=tuple(Placeable(name, GB, {"w0": speed}) for name, speed in SPEEDS.items()),
    hosts=(Host("w0", "n0", 10 * GB, 3),),
    digests=dict.fromkeys(SPEEDS, "d" * 32),
    cost_unit="FLOP",
)


def quick(_gear, _placement, _hosts) -> float:
    return 0.1


def models(gear) -> list[str]:
    return [stage.model for stage in gear.stages]


def test_nobody_errs_and_every_level_has_the_best_cascade():
    low, high = build_plan(INPUTS, quick).gears
    assert low.stages == high.stages
    assert low.promise.quality == high.promise.quality


def test_a_worker_used_too_much_takes_quality_from_that_level_alone():
    low, high = build_plan(replace(INPUTS, loads=(50.0, 4000.0)), quick).gears
    assert high.promise.quality < low.promise.quality


def test_triggers_are_tried_before_quality_is_given_up():
    def slow_without_triggers(gear, _placement, _hosts) -> float:
        waits = {1: 3.0, 2: 2.0, 4: 0.9, 8: 2.0}
        return waits[gear.triggers.get(gear.stages[0].model, 1)]

    best = build_plan(INPUTS, quick)
    tuned = build_plan(replace(INPUTS, target=Target(p95_s=1.0)), slow_without_triggers)
    assert [gear.stages for gear in tuned.gears] == [gear.stages for gear in best.gears]
    assert all(gear.triggers == {gear.stages[0].model: 4} for gear in tuned.gears)
    assert all(gear.promise.p95_s == 0.9 for gear in tuned.gears)


def test_a_trigger_that_gains_next_to_nothing_is_not_set():
    def hardly(gear, _placement, _hosts) -> float:
        return 1.0 - 0.01 * len(gear.triggers)

    assert all(not gear.triggers for gear in build_plan(INPUTS, hardly).gears)


def test_p95_missed_with_every_trigger_takes_the_next_cascade():
    def slow_while_the_large_one_is_asked(gear, _placement, _hosts) -> float:
        return 5.0 if "m2" in models(gear) else 0.5

    plan = build_plan(replace(INPUTS, target=Target(p95_s=1.0)), slow_while_the_large_one_is_asked)
    assert all("m2" not in models(gear) for gear in plan.gears)
    assert plan.placement
    with pytest.raises(InvalidRequest, match=r"cheapest cascade that may be used p95 is 5\.000 s"):
        build_plan(replace(INPUTS, target=Target(p95_s=1.0)), lambda *_: 5.0)


def test_guessed_loads_beyond_reach_are_left_out():
    loads = (50.0, 400.0, 4000.0, 10**9)
    with pytest.raises(InvalidRequest, match=r"load of 1e\+09 tokens/s is out of reach"):
        build_plan(replace(INPUTS, loads=loads), quick)
    guessed = build_plan(replace(INPUTS, loads=loads, may_drop_loads=True), quick)
    assert [gear.max_load for gear in guessed.gears] == [50.0, 400.0, 4000.0]
    assert any("no higher load than 4000 tokens/s" in line for line in guessed.assumptions)
    with pytest.raises(InvalidRequest, match="out of reach"):
        build_plan(replace(INPUTS, loads=(10**9,), may_drop_loads=True), quick)


def test_a_loss_alone_is_kept_as_cheaply_as_it_can_be():
    plan = build_plan(replace(INPUTS, target=Target(loss=0.06)), quick)
    best = build_plan(INPUTS, quick)
    for gear in plan.gears:
        assert gear.promise.cost < best.gears[0].promise.cost
        assert gear.promise.loss_bound == 0.06
        assert gear.promise.start_cost == 0.0
    assert plan.target == "loss <= 0.06 with delta 0.05"


def test_a_stage_that_is_seldom_asked_pays_for_its_starts():
    """At a low load few requests reach the large model in time to keep it: it is left out, or the
    promise says what its starts cost."""
    terms = {name: StartTerms(60.0, 500.0) for name in SPEEDS}
    cheap = replace(INPUTS, target=Target(loss=0.06), loads=(1.0, 300.0))
    free = build_plan(cheap, quick).gears
    paid = build_plan(replace(cheap, warmth=Warmth(60.0, terms)), quick).gears
    assert paid[0].stages != free[0].stages
    assert len(paid[0].stages) < len(free[0].stages)
    assert paid[1].stages == free[1].stages
    assert paid[0].promise.start_cost > 0.0
    assert paid[0].promise.cost > free[0].promise.cost
    assert paid[1].promise.start_cost < 1e-3 * paid[1].promise.cost


def test_models_without_room_beside_each_other_leave_cascades_of_others():
    two = tuple(replace(each, memory_bytes=4 * GB) for each in INPUTS.models)
    plan = build_plan(replace(INPUTS, models=two), quick)
    assert len({model for gear in plan.gears for model in models(gear)}) <= 2
    cheap = build_plan(replace(INPUTS, models=two, target=Target(loss=0.06)), quick)
    assert len({model for gear in cheap.gears for model in models(gear)}) <= 2
