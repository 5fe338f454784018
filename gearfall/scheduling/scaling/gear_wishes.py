"""What gear plans want kept warm, and where: replicas by model and node.

    the gear in force                     its models stay, on the nodes where the plan places them
    if its promise counts starts          they go by their keep-alive: the plan has paid for it
    the next gear up                      a model of it that takes longer to start than a shift may
                                          last stays too; no others make room for it
    every other gear                      its models go by their keep-alive, as long as they cost to
                                          come back, and start again when the gear wants them
    a node of the plan has no worker      gears and places are those of its variant for that node

Of several plans that place one model on one node, the largest number counts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from gearfall.core.gears.gear_plan import Gear
from gearfall.core.gears.gears_in_force import GearInForce
from gearfall.core.ids import DeploymentName, ModelName, NodeId
from gearfall.core.records import DeploymentRecord
from gearfall.scheduling.snapshot import Hosted, ReplicaKey


@dataclass(frozen=True, slots=True)
class GearWish:
    """What all plans together want of one model."""

    now: tuple[tuple[NodeId, int], ...] = ()
    """Replicas that the gears in force need, by node."""
    soon: tuple[tuple[NodeId, int], ...] = ()
    """Replicas that a gear above needs and that would come too late, by node."""
    places: tuple[tuple[NodeId, int], ...] = ()
    """Where plans would have it if it were up, whatever the gear."""
    most: int = 0
    """Replicas that any one gear plan places in all."""
    keep_alive_s: float = 0.0
    """Of the deployments whose plans name it."""
    reason: str = ""
    """The gears that want it, in words."""

    @property
    def by_node(self) -> dict[NodeId, int]:
        """Replicas to keep."""
        return _largest(self.now, self.soon)


StartSeconds = Callable[[ModelName, NodeId], float]
"""Expected seconds of a start of a model on a node."""


def gear_wishes(
    in_force: Mapping[DeploymentName, GearInForce],
    deployments: Mapping[DeploymentName, DeploymentRecord],
    *,
    host_of: Callable[[ModelName], ModelName],
    start_s: StartSeconds,
    shift_s: float,
) -> dict[ModelName, GearWish]:
    """Return each model's wish. Plans whose deployment is gone want nothing.

    `host_of`: of an adapter its base. `shift_s`: what a shift may take.
    """
    found: dict[ModelName, GearWish] = {}
    for name in sorted(in_force.keys() & deployments.keys()):
        plan = _PlanWish(name, in_force[name], host_of, start_s, shift_s)
        for model in plan.models:
            wish, known = plan.wish(model), found.get(model, GearWish())
            found[model] = GearWish(
                tuple(_largest(known.now, wish.now).items()),
                tuple(_largest(known.soon, wish.soon).items()),
                tuple(_largest(known.places, wish.places).items()),
                max(known.most, wish.most),
                max(known.keep_alive_s, deployments[name].keep_alive_s),
                "; ".join(filter(None, (known.reason, wish.reason))),
            )
    return found


def kept_replicas(wish: GearWish, on_node: Mapping[NodeId, list[Hosted]]) -> frozenset[ReplicaKey]:
    """Return those of a model's replicas that fulfil its wish, the ready ones first."""
    kept: set[ReplicaKey] = set()
    for node_id, count in wish.by_node.items():
        there = sorted(on_node.get(node_id, ()), key=lambda each: (not each.is_ready, each.key))
        kept.update(each.key for each in there[:count])
    return frozenset(kept)


def missing_on(
    wanted: Iterable[tuple[NodeId, int]], on_node: Mapping[NodeId, list[Hosted]]
) -> list[NodeId]:
    """Return the nodes that have fewer replicas of a model than wanted, as often as they lack."""
    return [
        node_id
        for node_id, count in wanted
        for _ in range(max(0, count - len(on_node.get(node_id, ()))))
    ]


@dataclass(frozen=True, slots=True)
class _PlanWish:
    """What one plan wants."""

    name: DeploymentName
    standing: GearInForce
    host_of: Callable[[ModelName], ModelName]
    start_s: StartSeconds
    shift_s: float

    @property
    def models(self) -> list[ModelName]:
        return sorted({self.host_of(ModelName(each.model)) for each in self.standing.placement})

    def wish(self, model: ModelName) -> GearWish:
        by_node, index = self._places(model), self.standing.index
        places = tuple(by_node.items())
        wish = GearWish(places=places, most=sum(by_node.values()))
        if self._keeps(self.standing.gear, model):
            return replace(wish, now=places, reason=f"gear {index} of {self.name}")
        above = self.standing.gears[index + 1 : index + 2]
        late = tuple(each for each in places if self._is_late(model, each[0]))
        if above and late and self._keeps(above[0], model):
            return replace(wish, soon=late, reason=f"gear {index + 1} of {self.name}, to come")
        return wish

    def _places(self, model: ModelName) -> dict[NodeId, int]:
        return _largest(
            (NodeId(each.node), each.count)
            for each in self.standing.placement
            if self.host_of(ModelName(each.model)) == model
        )

    def _keeps(self, gear: Gear, model: ModelName) -> bool:
        """Whether a gear asks a model and was planned with it up all the time."""
        is_asked = any(self.host_of(stage.model) == model for stage in gear.stages)
        return is_asked and gear.promise.start_cost <= 0.0

    def _is_late(self, model: ModelName, node_id: NodeId) -> bool:
        return self.start_s(model, node_id) > self.shift_s


def _largest(*wanted: Iterable[tuple[NodeId, int]]) -> dict[NodeId, int]:
    found: dict[NodeId, int] = {}
    for each in wanted:
        for node_id, count in each:
            found[node_id] = max(found.get(node_id, 0), count)
    return found
