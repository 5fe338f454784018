import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.calibration import Calibration
from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import (
    Gear,
    GearPlan,
    PlacedReplicas,
    Promise,
    Variant,
    gear_for,
    plan_diff,
    plan_text,
)
from gearfall.core.gears.gear_plan_checks import check_plan, counting_of, parse_plan
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage

SMALL, LARGE = ModelName("small"), ModelName("large")
LOST = "node-2"


def promise(stages=2, **changes) -> Promise:
    escalated = (1.0, 0.25)[:stages]
    return replace(Promise(0.95, 0.93, 0.05, 700, 3.0, 1.5, escalated), **changes)


def gear(max_load=100.0, *, threshold=0.8) -> Gear:
    stages = (Stage(SMALL, threshold), Stage(LARGE))
    return Gear(max_load, stages, promise(), {"large": 4}, {"small": {"node-1": 0.5, LOST: 0.5}})


def last() -> Gear:
    return Gear(1000.0, (Stage(SMALL),), promise(stages=1))


SURE = Calibration(("mean",), (0.0,), (1.0,), (1.0,), 0.0, ((0.0, 0.0), (1.0, 1.0)))
PLACED = (
    PlacedReplicas("node-1", "small", 1),
    PlacedReplicas("node-1", "large", 1),
    PlacedReplicas(LOST, "small", 2),
)
LEFT = replace(gear(), shares={})
PLAN = GearPlan(
    name="chat",
    version=1,
    made_unix_s=1.0,
    target="quality >= 0.9 with delta 0.05",
    cost_unit="MFLOP",
    models={"small": "a" * 32, "large": "b" * 32},
    gears=(gear(), last()),
    placement=PLACED,
    assumptions=("prompts as in the profile",),
    variants=(Variant(LOST, (LEFT, last()), PLACED[:2]),),
    calibrations={"small": SURE},
)


def test_a_plan_is_read_as_it_was_written():
    text = plan_text(PLAN)
    assert parse_plan(text) == PLAN
    assert '  "target": "quality >= 0.9 with delta 0.05"' in text.splitlines()[4]


def test_a_plan_from_before_agreement_was_promised_is_taken():
    older = json.loads(plan_text(PLAN))
    del older["agreement_rule"]
    for gears in (older["gears"], *(each["gears"] for each in older["variants"])):
        for each in gears:
            del each["promise"]["agreement"], each["promise"]["accepted"]
    assert parse_plan(json.dumps(older)) == PLAN


def with_gear(**changes) -> GearPlan:
    return replace(PLAN, gears=(replace(gear(), **changes), last()))


COUNTING = Stage(SMALL, 0.5, SelfConsistency(3))
OTHERWISE = (replace(COUNTING, self_consistency=SelfConsistency(3, 1.0)), Stage(LARGE))


def with_stages(first: Stage, **changes) -> GearPlan:
    return replace(with_gear(stages=(first, Stage(LARGE))), **changes)


def test_a_plan_may_count_equal_answers():
    plan = with_stages(COUNTING)
    assert parse_plan(plan_text(plan)) == plan
    assert counting_of(plan) == [SelfConsistency(3)]
    assert counting_of(PLAN) == []


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (replace(PLAN, format_version=2), "format_version: 2"),
        (replace(PLAN, name="a/b"), "name"),
        (replace(PLAN, version=0), "begins at 1"),
        (replace(PLAN, agreement_rule="roughly"), "agreement_rule 'roughly'"),
        (with_gear(promise=promise(agreement=(0.9,))), "one number accepted"),
        (with_gear(promise=promise(agreement=(0.9, 0.9), accepted=(5, 5))), "but the last"),
        (with_gear(promise=promise(agreement=(None,), accepted=(5,))), "5 answers"),
        (with_gear(promise=promise(agreement=(1.5,), accepted=(5,))), "agreement: 1.5"),
        (with_stages(COUNTING, hold_tokens=8), "one of --hold-tokens and --samples"),
        (with_stages(replace(COUNTING, self_consistency=SelfConsistency(9))), "9 must be between"),
        (
            replace(
                with_stages(COUNTING),
                variants=(Variant(LOST, (replace(LEFT, stages=OTHERWISE), last()), PLACED[:2]),),
            ),
            "stages differ in it",
        ),
        (
            with_gear(stages=(Stage(SMALL, 0.5), Stage(LARGE, None, SelfConsistency(3)))),
            "no threshold and no self_consistency",
        ),
        (replace(PLAN, models={}), "name each model"),
        (replace(PLAN, models={"small": "a"}), "large is not among"),
        (replace(PLAN, gears=()), "0 gears"),
        (replace(PLAN, certainty="mood"), "certainty 'mood'"),
        (replace(PLAN, calibrations={"other": SURE}), "other is not among"),
        (replace(PLAN, calibrations={"small": replace(SURE, bias=math.nan)}), "finite bias"),
        (replace(PLAN, gears=(last(), gear())), "max_load must rise"),
        (replace(PLAN, placement=PLACED[:1]), "placed nowhere"),
        (replace(PLAN, placement=(*PLACED, PLACED[0])), "twice on one node"),
        (replace(PLAN, placement=(*PLACED[:2], PlacedReplicas(LOST, "small", 0))), "0 replicas"),
        (
            replace(PLAN, placement=(*PLACED[:2], PlacedReplicas(LOST, "small", 1025))),
            "1025 replicas of small on '.*'; 1 to 1024",
        ),
        (replace(PLAN, variants=(*PLAN.variants, *PLAN.variants)), "lost twice"),
        (replace(PLAN, variants=(Variant(LOST, PLAN.gears, PLACED),)), "uses the lost node"),
        (with_gear(max_load=float("nan")), "max_load: nan"),
        (with_gear(stages=()), "0 stages"),
        (with_gear(stages=(Stage(SMALL, 0.5), Stage(SMALL))), "twice"),
        (with_gear(stages=(Stage(SMALL, 1.5), Stage(LARGE))), "stages: 1.5"),
        (with_gear(stages=(Stage(SMALL), Stage(LARGE))), "stages: None"),
        (with_gear(stages=(Stage(SMALL, 0.5), Stage(LARGE, 0.5))), "always answers"),
        (with_gear(triggers={"large": 0}), "1 to 4096"),
        (with_gear(shares={"small": {"node-1": 0.7}}), "add up to 0.7"),
        (with_gear(shares={"small": {"node-9": 1.0}}), "node-9 is not in placement"),
        (with_gear(promise=promise(quality=float("inf"))), "quality: inf"),
        (with_gear(promise=promise(cost=0.0)), "cost: 0.0"),
        (with_gear(promise=promise(queries=-1)), "queries: -1"),
        (with_gear(promise=promise(stages=1)), "one share for each stage"),
        (with_gear(promise=promise(loss_bound=-0.1)), "loss_bound: -0.1"),
        (with_gear(promise=promise(start_cost=3.1)), "start_cost: 3.1"),
    ],
)
def test_a_plan_that_could_not_be_followed_is_refused(plan, says):
    with pytest.raises(InvalidRequest, match=says):
        check_plan(plan)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": 1}', "[" * 10_000, b"\xff", "x" * 2_000_000]
)
def test_what_is_no_plan(text):
    with pytest.raises(InvalidRequest):
        parse_plan(text)


@given(st.floats(0.0, 1e6))
def test_each_load_has_the_gear_that_holds_it(load):
    found = gear_for(PLAN.gears, load)
    assert load <= PLAN.gears[found].max_load or found == len(PLAN.gears) - 1
    assert found == 0 or load > PLAN.gears[found - 1].max_load


def test_a_diff_names_each_value_that_changed():
    other = replace(with_gear(stages=(Stage(SMALL, 0.9), Stage(LARGE))), version=2)
    assert plan_diff(PLAN, other) == (
        "version: 1 -> 2",
        "gears.0.stages.0.threshold: 0.8 -> 0.9",
    )
    assert plan_diff(PLAN, PLAN) == ()
    shorter = replace(PLAN, assumptions=())
    assert plan_diff(PLAN, shorter) == ('assumptions.0: "prompts as in the profile" -> nothing',)
