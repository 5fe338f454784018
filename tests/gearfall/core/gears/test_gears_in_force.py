from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.gears.gear_plan import (
    Gear,
    GearPlan,
    PlacedReplicas,
    Promise,
    Variant,
    plan_text,
)
from gearfall.core.gears.gear_records import GearPlanRecord, GearVoteRecord
from gearfall.core.gears.gears_in_force import PlanShelf, highest_vote, on_nodes
from gearfall.core.ids import DeploymentName, ModelName, RouterId
from gearfall.core.records import Stage

NAME = DeploymentName("chat")
ALONE = (Stage(ModelName("small")),)
GEAR = Gear(50.0, ALONE, Promise(0.9, 0.0, 0.1, 0, 1.0, 1.0, (1.0,)))
HIGH = replace(GEAR, max_load=500.0)
ON_A = (PlacedReplicas("a", "small", 2),)
BOTH = (PlacedReplicas("a", "small", 1), PlacedReplicas("b", "small", 1))
PLAN = GearPlan(
    "chat", 3, 1.0, "a test", "FLOP", {"small": ""}, (GEAR, HIGH), BOTH,
    variants=(Variant("b", (HIGH,), ON_A),),
)  # fmt: skip
RECORD = GearPlanRecord(NAME, 3, plan_text(PLAN))


def vote(router: str, gear: int, version: int = 3) -> GearVoteRecord:
    return GearVoteRecord(NAME, RouterId(router), version, gear, 1.0, 0.0)


def read(*votes: GearVoteRecord, nodes=("a", "b"), record=RECORD):
    return PlanShelf().read({NAME: record}, {(v.name, v.router_id): v for v in votes}, nodes)


def test_the_highest_vote_for_this_version_is_in_force():
    assert read()[NAME].index == 0
    assert read(vote("r1", 0), vote("r2", 1))[NAME].gear == HIGH
    assert read(vote("r1", 1, version=2))[NAME].index == 0


def test_without_a_node_the_variants_gears_and_places_count():
    found = read(vote("r1", 1), nodes=("a",))[NAME]
    assert (found.gears, found.placement, found.index) == ((HIGH,), ON_A, 0)
    assert on_nodes(PLAN, {"b"}) == (PLAN.gears, PLAN.placement), "no variant without node a"


def test_votes_for_another_deployment_do_not_count():
    other = replace(vote("r1", 1), name=DeploymentName("other"))
    assert read(other)[NAME].index == 0


def test_a_broken_record_is_no_plan_and_a_mended_one_is():
    shelf = PlanShelf()
    broken = replace(RECORD, content="{}")
    assert shelf.read({NAME: broken}, {}, ("a", "b")) == {}
    assert shelf.read({NAME: RECORD}, {}, ("a", "b"))[NAME].plan == PLAN
    assert shelf.read({}, {}, ("a", "b")) == {}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9))), st.integers(1, 5))
def test_whatever_is_voted_the_gear_is_one_of_the_plan(cast, gears):
    votes = [vote(str(number), gear, version) for number, (version, gear) in enumerate(cast)]
    found = highest_vote(votes, 3, gears)
    assert 0 <= found < gears
    mine = [min(gear, gears - 1) for version, gear in cast if version == 3]
    assert found == max(mine, default=0)
