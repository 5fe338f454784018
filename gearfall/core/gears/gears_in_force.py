"""Which gear of each plan is in force, as routers, workers and the scheduler read it from records.

The highest vote for the plan's version counts; without one, the lowest gear. Where a node of the
plan has no worker any more, the gears and the placement are those of the variant for that node.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from gearfall.core.errors import GearfallError
from gearfall.core.gears.gear_plan import Gear, GearPlan, PlacedReplicas
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.core.gears.gear_records import GearPlanRecord, GearVoteRecord
from gearfall.core.ids import DeploymentName, RouterId

Votes = Mapping[tuple[DeploymentName, RouterId], GearVoteRecord]


@dataclass(frozen=True, slots=True)
class GearInForce:
    """Where one deployment's plan stands."""

    plan: GearPlan
    gears: tuple[Gear, ...]
    """The plan's, or those of the variant for a node that is gone."""
    placement: tuple[PlacedReplicas, ...]
    index: int

    @property
    def gear(self) -> Gear:
        """The one in force."""
        return self.gears[self.index]


def on_nodes(
    plan: GearPlan, nodes: Collection[str]
) -> tuple[tuple[Gear, ...], tuple[PlacedReplicas, ...]]:
    """Return gears and placement for the nodes that have workers."""
    gone = {placed.node for placed in plan.placement}.difference(nodes)
    for variant in plan.variants:
        if variant.lost_node in gone:
            return variant.gears, variant.placement
    return plan.gears, plan.placement


def highest_vote(votes: Iterable[GearVoteRecord], version: int, gears: int) -> int:
    """Return the gear that the votes for a plan of `gears` gears put in force."""
    wanted = (vote.gear for vote in votes if vote.version == version)
    return min(max(wanted, default=0), gears - 1)


class PlanShelf:
    """Plans as they were parsed last: each record is read once, and a broken one is no plan."""

    def __init__(self) -> None:
        self._known: dict[DeploymentName, tuple[GearPlanRecord, GearPlan | None]] = {}

    def read(
        self,
        records: Mapping[DeploymentName, GearPlanRecord],
        votes: Votes,
        nodes: Collection[str],
    ) -> dict[DeploymentName, GearInForce]:
        """Return what is in force; `nodes` are those that have workers."""
        for name in self._known.keys() - records.keys():
            del self._known[name]
        cast: dict[DeploymentName, list[GearVoteRecord]] = {}
        for (name, _), vote in votes.items():
            cast.setdefault(name, []).append(vote)
        found = {}
        for name, record in records.items():
            plan = self._plan(record)
            if plan is not None:
                gears, placement = on_nodes(plan, nodes)
                index = highest_vote(cast.get(name, ()), plan.version, len(gears))
                found[name] = GearInForce(plan, gears, placement, index)
        return found

    def _plan(self, record: GearPlanRecord) -> GearPlan | None:
        known = self._known.get(record.name)
        if known is None or known[0] != record:
            try:
                plan = parse_plan(record.content)
            except GearfallError:
                plan = None
            known = self._known[record.name] = (record, plan)
        return known[1]
