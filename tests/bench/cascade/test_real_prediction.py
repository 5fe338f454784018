"""What is predicted from a made-up profile, and the plans that others are compared by."""

from dataclasses import replace

import pytest

from bench.cascade.real_figures import figures_of
from bench.cascade.real_prediction import Predictor, one_gear, placed_everywhere
from bench.cascade.real_systems import Singles
from bench.cascade.real_work import Window
from gearfall.core.gears.gear_plan import Gear, GearPlan, Promise, plan_text
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.core.ids import ModelName
from gearfall.core.profile import Generation, Profile, ProfiledModel, Speed, check_profile
from gearfall.core.records import Stage
from gearfall.simulation.arrivals import TraceRow

COUNT = 60
SURE, UNSURE = (-0.01,) * 4, (-1.0,) * 4


def model(name: str, step_s: float, cost: float, wrong_every: int) -> ProfiledModel:
    """One token a step whatever its size; every so many answers are wrong and unsure."""
    speed = Speed(0.0, step_s, 0.0, ((1, step_s), (400, step_s)), request_s=0.001)
    answers = tuple(
        Generation(
            float(number % wrong_every > 0),
            cost,
            5 + number % 3,
            4,
            SURE if number % wrong_every else UNSURE,
            (5.0,) * 4,
            token_ids=(number, 1, 2),
        )
        for number in range(COUNT)
    )
    return ProfiledModel(name, "d" * 32, 10**6, 4, {"cpu": speed}, {"ssd": 1.0}, answers)


PROFILE = Profile(
    1.0, "FLOP", tuple(map(str, range(COUNT))), (model("s", 0.01, 1, 3), model("l", 0.1, 10, 30))
)
PREDICTOR = Predictor(PROFILE, workers=2)
WINDOW = Window(tuple(TraceRow(n / 10, n % 7, 1) for n in range(1000)), 100.0)
CASCADE = Gear(
    1e6,
    (Stage(ModelName("s"), 0.5), Stage(ModelName("l"))),
    Promise(0.9, 0.8, 0.05, 60, 4.0, 1.0, (1.0, 0.3)),
)
PLAN = GearPlan(
    "ours", 3, 1.0, "p95 <= 1 s", "FLOP", {"s": "d" * 32, "l": "d" * 32},
    (replace(CASCADE, max_load=10.0), CASCADE), placed_everywhere(["s", "l"], 2),
)  # fmt: skip


def test_the_profile_is_one():
    check_profile(PROFILE)


def test_alone_is_the_way_and_a_step_for_each_token():
    assert PREDICTOR.alone_s("s") == pytest.approx(0.001 + 4 * 0.01)


def test_capacity_is_full_slots_on_all_workers():
    # Four slots and four steps each: one answer a step on each of two workers.
    assert PREDICTOR.capacity_per_s("l") == pytest.approx(2 / 0.1)


def test_a_calm_run_has_the_profile_s_quality_and_cost_and_no_queue():
    found = figures_of(PREDICTOR.predict(PLAN, WINDOW, 1.0, 60.0))
    assert found.requests == 60
    # A third goes up, and that after its first unsure token; two are wrong there too.
    assert found.quality == pytest.approx(1 - 2 / 60)
    assert 1 * 2 / 3 + 10 / 3 < found.cost < 1 + 10 / 3
    assert found.stages == pytest.approx(4 / 3)
    assert found.p50_s == pytest.approx(PREDICTOR.alone_s("s"))
    assert found.queued_s == 0.0
    assert found.door_s == pytest.approx(0.001 * found.stages)


def test_too_much_for_the_largest_is_seen():
    alone = one_gear(PLAN, "alone", replace(CASCADE, stages=(Stage(ModelName("l")),)))
    calm, crowded = (
        figures_of(PREDICTOR.predict(alone, WINDOW, per_s, 10.0)) for per_s in (5.0, 40.0)
    )
    assert calm.p95_s < 0.6
    assert crowded.p95_s > 2.0


def test_one_gear_of_a_plan_is_a_plan():
    single = one_gear(PLAN, "static", PLAN.gears[0])
    assert parse_plan(plan_text(single)) == single
    assert (single.name, single.gears) == ("static", PLAN.gears[:1])


def test_single_models_fall_with_the_load_and_make_a_plan():
    singles = Singles(PREDICTOR, PLAN)
    chosen = [singles.best(["l", "s"], load, 0.7) for load in (20.0, 900.0)]
    assert [gear.stages[0].model for gear in chosen] == ["l", "s"]
    plan = singles.plan("switching", chosen)
    assert parse_plan(plan_text(plan)) == plan
    assert plan.gears[0].promise.quality == pytest.approx(1 - 2 / 60)
    assert singles.tuned(chosen[1]).triggers.keys() == {"s"}


def test_a_single_model_is_judged_with_its_best_trigger_as_ours_is():
    batched = Speed(0.0, 0.02, 0.0, ((1, 0.02), (4, 0.04)), request_s=0.001)
    small, large = PROFILE.models
    profile = replace(PROFILE, models=(small, replace(large, speeds={"cpu": batched})))
    singles = Singles(Predictor(profile, workers=2), PLAN)
    tuned = singles.tuned(singles.gear("l", 400.0))
    assert tuned.triggers == {"l": 2}
    # The trigger gains a few per cent: no other p95 holds here, nor this one without it.
    assert singles.best(["l", "s"], 400.0, tuned.promise.p95_s) == tuned
