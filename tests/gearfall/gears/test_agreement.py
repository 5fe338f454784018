from dataclasses import replace

import numpy as np
import pytest

from gearfall.core.gears.gear_plan import Gear, GearPlan, PlacedReplicas, Promise, Variant
from gearfall.core.ids import ModelName
from gearfall.core.records import AskedModel, Stage
from gearfall.gears.agreement import KeyedAnswers, agreement_of, with_agreement

SMALL, MIDDLE, LARGE = (ModelName(name) for name in ("small", "middle", "large"))


def keyed(certainty, keys) -> KeyedAnswers:
    return KeyedAnswers(np.array(certainty), np.array(list(keys)))


ANSWERS: dict[AskedModel, KeyedAnswers] = {
    (SMALL, None): keyed([0.9, 0.9, 0.4, 0.2, 0.5], "abcde"),
    (MIDDLE, None): keyed([0.0, 0.0, 0.8, 0.1, 0.9], "xxcyz"),
    (LARGE, None): keyed([1.0] * 5, "axcde"),
}
TWO = (Stage(SMALL, 0.5), Stage(LARGE))
THREE = (Stage(SMALL, 0.6), Stage(MIDDLE, 0.7), Stage(LARGE))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (TWO, ((2 / 3, 3),)),
        (THREE, ((0.5, 2), (0.5, 2))),
        ((Stage(SMALL, 1.0), Stage(LARGE)), ((None, 0),)),
        ((Stage(SMALL, 0.0), Stage(LARGE)), ((0.8, 5),)),
        ((Stage(LARGE),), ()),
    ],
)
def test_of_accepted_answers_those_that_the_last_stage_gives_too(stages, expected):
    found = agreement_of(stages, ANSWERS)
    assert [count for _, count in found] == [count for _, count in expected]
    assert [share for share, _ in found] == pytest.approx([share for share, _ in expected])


def gear(stages, max_load=1.0) -> Gear:
    return Gear(max_load, stages, Promise(0.9, 0.0, 0.1, 0, 1.0, 1.0, (1.0,) * len(stages)))


def test_every_gear_promises_what_its_own_thresholds_give():
    placed = (PlacedReplicas("n", "small", 1), PlacedReplicas("n", "large", 1))
    plan = GearPlan(
        "chat", 1, 1.0, "", "FLOP", {"small": "", "large": ""}, (gear(TWO), gear((Stage(SMALL),))),
        placed, variants=(Variant("n", (gear(THREE),), placed),),
    )  # fmt: skip
    made = with_agreement(plan, ANSWERS, "normalised")
    assert made.agreement_rule == "normalised"
    assert list(made.gears[0].promise.agreement) == pytest.approx([2 / 3])
    assert made.gears[0].promise.accepted == (3,)
    assert made.gears[1] == plan.gears[1]
    assert made.variants[0].gears[0].promise.accepted == (2, 2)
    unknown: dict[AskedModel, KeyedAnswers] = {(LARGE, None): ANSWERS[LARGE, None]}
    assert with_agreement(plan, unknown, "exact") == replace(plan, agreement_rule="exact")
