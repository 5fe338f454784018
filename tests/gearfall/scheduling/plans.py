"""Gear plans as records, for the tests of the scheduler."""

from dataclasses import replace

from gearfall.core.gears.gear_plan import (
    Gear,
    GearPlan,
    PlacedReplicas,
    Promise,
    Variant,
    plan_text,
)
from gearfall.core.gears.gear_records import GearPlanRecord, GearVoteRecord
from gearfall.core.ids import DeploymentName, ModelName, RouterId
from gearfall.core.records import Stage

NAME = "chat"


def gear(*models: str, max_load: float = 10.0) -> Gear:
    *lower, last = (Stage(ModelName(each), 0.5) for each in models)
    stages = (*lower, Stage(last.model))
    promise = Promise(0.9, 0.0, 0.1, 0, 1.0, 1.0, tuple(1.0 for _ in stages))
    return Gear(max_load, stages, promise)


def placed(*places: str) -> tuple[PlacedReplicas, ...]:
    """Each `node/model` or `node/model/count`."""
    found = [each.split("/") for each in places]
    return tuple(PlacedReplicas(each[0], each[1], int((*each, "1")[2])) for each in found)


def plan(*gears: tuple[str, ...], on: tuple[str, ...], name=NAME, lost=None, left=()) -> GearPlan:
    """Gears by their models; `left`: the places without node `lost`, for the first gear's models
    that it names."""
    made = tuple(gear(*models, max_load=10.0**at) for at, models in enumerate(gears, 1))
    names = {stage.model for each in made for stage in each.stages}
    variants: tuple[Variant, ...] = ()
    if lost is not None:
        still = {each.model for each in placed(*left)}
        kept = tuple(each for each in made if {stage.model for stage in each.stages} <= still)
        variants = (Variant(lost, kept, placed(*left)),)
    return GearPlan(
        name, 1, 1.0, "a test", "FLOP", dict.fromkeys(sorted(names), ""), made, placed(*on),
        variants=variants,
    )  # fmt: skip


def plan_record(made: GearPlan) -> GearPlanRecord:
    return GearPlanRecord(DeploymentName(made.name), made.version, plan_text(made))


def vote(gear: int, *, name=NAME, version=1, router="r", load=1.0) -> GearVoteRecord:
    return GearVoteRecord(DeploymentName(name), RouterId(router), version, gear, load, 0.0)


def paid(made):
    """The same plan, made with the cost of starts in its promises."""
    gears = [replace(g, promise=replace(g.promise, start_cost=0.5)) for g in made.gears]
    return replace(made, gears=tuple(gears))


ON_TWO = plan(
    ("small", "large"), ("small",), ("alone",), on=("a/small", "b/small", "b/large", "a/alone")
)
ON_BOTH = plan(("small",), on=("a/small", "b/small"))
