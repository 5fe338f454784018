"""What a decision is made from, and what a start would take at one node of it."""

from dataclasses import dataclass, field

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import ModelRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.estimator import StartPrediction, predict_start
from gearfall.scheduling.estimates.start_costs import ANY_NODE, StartCosts, fixed_s
from gearfall.scheduling.fleet.fleet_state import FleetState
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy

PUSH_OUT_WEIGHT = 0.5
"""Of a load, for those whose bytes leave memory for it; fitted, see docs/decisions/0019."""


@dataclass(frozen=True, slots=True)
class Scene:
    """The fleet, brought up to date, what starts cost, and when it is."""

    fleet: FleetState
    costs: StartCosts
    policy: SchedulerPolicy
    now_unix_s: float
    predictions: dict[tuple[ModelName, NodeId], tuple[int, StartPrediction | None]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """What was predicted, each with how often its node had been touched by then."""


def predict(scene: Scene, model: ModelRecord, node_id: NodeId) -> StartPrediction | None:
    """Return the expected start on a live node; None when the model's bytes can't get there.

    Far and near loads run beside each other; among its kind each waits for those before it.
    """
    place, touched = (model.name, node_id), scene.fleet.node_touches.get(node_id, 0)
    known = scene.predictions.get(place)
    if known is None or known[0] != touched:
        known = scene.predictions[place] = (touched, _predict(scene, model, node_id))
    return known[1]


def _predict(scene: Scene, model: ModelRecord, node_id: NodeId) -> StartPrediction | None:
    fleet = scene.fleet
    node, tier = fleet.records.nodes.get(node_id), fleet.source_tier(model, node_id)
    if node is None or tier is None:
        return None
    queued: list[tuple[int, float]] = []
    if tier is not Tier.DRAM:
        for name, since_unix_s in fleet.loading_on(node_id).items():
            other = fleet.model(name)
            if other and name != model.name and fleet.source_tier(other, node_id) is tier:
                queued.append((other.size_bytes, scene.now_unix_s - since_unix_s))
    return predict_start(model, node, tier, scene.costs, queued=queued)


def least_start_s(scene: Scene, model: ModelRecord) -> float:
    """Return how long a start takes at least: from memory, with nothing in the way."""
    return fixed_s(scene.costs, model.name, model.size_bytes, Tier.DRAM, ANY_NODE)


def may_fetch_ahead(scene: Scene, want: Want, worker_id: WorkerId) -> bool:
    """Whether a model's bytes may come to where it waits for room: only who is next moves bytes."""
    if scene.policy.prefetch is None or want.urgency is not Urgency.INTERACTIVE:
        return False
    return scene.fleet.lines.is_first(want.model.name, worker_id, want.since_unix_s)


def push_out_s(
    scene: Scene, model: ModelRecord, node_id: NodeId, prediction: StartPrediction
) -> float:
    """Return what a load costs those whose bytes have to leave the node's memory for it.

    Somebody as large may have to be read again: it is worth waiting for a place where the bytes
    are in memory for as long as the load takes, and a part of that again.
    """
    node = scene.fleet.records.nodes[node_id]
    fits = node.dram_used_bytes + model.size_bytes <= node.dram_capacity_bytes
    return 0.0 if fits or not prediction.bytes_per_s else PUSH_OUT_WEIGHT * prediction.load_s


def needed_bytes(fleet: FleetState, want: Want, worker_id: WorkerId) -> int:
    """Return what a wanted replica reserves on a worker."""
    slots = fleet.records.workers[worker_id].slots
    return fleet.needed_bytes(want.model, slots, want.rules.accelerators)


def claimed_bytes(fleet: FleetState, model: ModelName, worker_id: WorkerId) -> int | None:
    """Return how much of a worker's room waits for the model itself; None for no claim."""
    return fleet.claims.on(worker_id).get(model)


def is_crowded(fleet: FleetState, model: ModelName, node_id: NodeId) -> bool:
    """Whether a node has a replica of the model."""
    workers = fleet.index.workers.get(node_id, set())
    return not workers.isdisjoint(fleet.index.holders.get(model, ()))


def is_coming(fleet: FleetState, model: ModelName, node_id: NodeId) -> bool:
    """Whether a node's store was told to bring a model's bytes to memory."""
    wish = fleet.records.prefetch.get((node_id, model))
    return wish is not None and wish.tier is Tier.DRAM
