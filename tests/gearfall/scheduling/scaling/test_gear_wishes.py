"""What gear plans want kept."""

import pytest

from gearfall.core.gears.gears_in_force import PlanShelf
from gearfall.core.ids import ModelName, NodeId
from gearfall.scheduling.scaling.gear_wishes import GearWish, gear_wishes
from tests.gearfall.scheduling.clusters import (
    deployment,
)
from tests.gearfall.scheduling.plans import NAME, ON_TWO, paid, placed, plan, plan_record, vote

SMALL, LARGE, ALONE = map(ModelName, ("small", "large", "alone"))
A, B = NodeId("a"), NodeId("b")
QUICK_S, SLOW_S = 0.5, 5.0


def wishes(made, *votes, nodes=("a", "b"), start_s=QUICK_S, deployed=True):
    cast = {(each.name, each.router_id): each for each in votes}
    record = plan_record(made)
    in_force = PlanShelf().read({record.name: record}, cast, nodes)
    known = deployment("small", name=NAME, keep_alive_s=60.0)
    return gear_wishes(
        in_force,
        {known.name: known} if deployed else {},
        host_of=lambda name: name,
        start_s=lambda *_: start_s,
        shift_s=1.0,
    )


@pytest.mark.parametrize(
    ("gear", "expected"),
    [
        (0, {SMALL: {A: 1, B: 1}, LARGE: {B: 1}, ALONE: {}}),
        (1, {SMALL: {A: 1, B: 1}, LARGE: {}, ALONE: {}}),
        (2, {SMALL: {}, LARGE: {}, ALONE: {A: 1}}),
    ],
)
def test_the_gear_in_force_keeps_its_models_where_the_plan_has_them(gear, expected):
    found = wishes(ON_TWO, vote(gear))
    assert {name: wish.by_node for name, wish in found.items()} == expected
    assert {name: wish.most for name, wish in found.items()} == {SMALL: 2, LARGE: 1, ALONE: 1}
    assert {wish.keep_alive_s for wish in found.values()} == {60.0}


def test_what_the_next_gear_needs_is_kept_when_it_starts_slower_than_a_shift():
    found = wishes(ON_TWO, vote(1), start_s=SLOW_S)
    assert found[ALONE].soon == ((A, 1),)
    assert found[ALONE].now == ()
    assert found[LARGE].by_node == {}, "a gear below is nobody's next"
    assert wishes(ON_TWO, vote(0), start_s=SLOW_S)[ALONE].by_node == {}, "two gears up is far"


def test_a_lost_node_leaves_what_its_variant_wants():
    made = plan(("small", "large"), ("small",), on=("a/small", "b/large"), lost="b",
                left=("a/small/2",))  # fmt: skip
    there = ((A, 2),)
    expected = GearWish(there, (), there, 2, 60.0, "gear 0 of chat")
    assert wishes(made, nodes=("a",))[SMALL] == expected
    assert LARGE not in wishes(made, nodes=("a",))


def test_a_plan_that_counts_starts_keeps_nothing_and_still_says_where():
    found = wishes(paid(ON_TWO), start_s=SLOW_S)
    assert all(wish.by_node == {} for wish in found.values())
    assert dict(found[SMALL].places) == {A: 1, B: 1}


def test_a_plan_without_its_deployment_wants_nothing():
    assert wishes(ON_TWO, deployed=False) == {}


def test_placed_reads_counts():
    assert [(p.node, p.model, p.count) for p in placed("a/m", "b/m/3")] == [
        ("a", "m", 1),
        ("b", "m", 3),
    ]
