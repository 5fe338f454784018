"""Where a replica's jobs could go on, so that another model may start where they run.

ServerlessLLM (arXiv 2401.14351), section 6.2: the place is free once the model is ready elsewhere
and the jobs have moved there, each for a * (t_in + t_out) + b.
"""

from dataclasses import dataclass, replace

from gearfall.core.ids import WorkerId
from gearfall.core.records import ModelRecord, ReplicaRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.estimator import StartPrediction
from gearfall.scheduling.estimates.start_costs import ANY_NODE, fixed_s
from gearfall.scheduling.fleet.victims import Victim, VictimKind
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.placement.placement_search import Search, may_be_free
from gearfall.scheduling.placement.work_ahead import moving_s
from gearfall.scheduling.scene import Scene, predict, push_out_s
from gearfall.scheduling.snapshot import ReplicaKey


@dataclass(frozen=True, slots=True)
class Transfer:
    """A replica's way to another worker."""

    key: ReplicaKey
    target: WorkerId
    seconds: float
    """Until the room is free."""
    start: StartPrediction | None = None
    """At the target; None where the model is ready there."""
    cost_s: float = 0.0
    """To those whose bytes leave memory there, if its own have to be read."""


def find_transfer(
    scene: Scene, victim: Victim, avoid: frozenset[WorkerId], sooner_than_s: float
) -> Transfer | None:
    """Return the soonest way to have a victim elsewhere; None for none below `sooner_than_s`."""
    fleet, key = scene.fleet, victim.key
    replica = fleet.records.replicas.get(key)
    hosted = fleet.index.hosted[key[1]][key]
    model = fleet.model(key[1])
    if replica is None or model is None or hosted.assignment.group or key in fleet.records.moves:
        return None
    # A worker that does not say what runs can't be asked to move it.
    is_known = bool(replica.jobs) or not replica.running_jobs
    move_s = moving_s(replica, scene.now_unix_s)
    if move_s >= sooner_than_s or not is_known:
        return None
    ready = _ready_elsewhere(scene, replica) if victim.kind is not VictimKind.KEPT else None
    if ready is not None:
        return Transfer(key, ready, move_s)
    least_s = fixed_s(scene.costs, key[1], model.size_bytes, Tier.DRAM, ANY_NODE)
    can_pay = least_s + move_s < sooner_than_s
    started = _started_elsewhere(scene, key, model, avoid) if can_pay else None
    if started is None or started.seconds + move_s >= sooner_than_s:
        return None
    # What runs on until the target is ready has longer answers to move by then.
    later_s = moving_s(replica, scene.now_unix_s + started.seconds)
    return replace(started, seconds=started.seconds + later_s)


def _ready_elsewhere(scene: Scene, leaving: ReplicaRecord) -> WorkerId | None:
    """Return a worker where the model is ready with room for all the jobs, the emptiest first."""
    records = scene.fleet.records
    found = [
        (-hosted.free_slots, key[0])
        for key, hosted in scene.fleet.index.hosted.get(leaving.model, {}).items()
        if key[0] != leaving.worker_id
        and hosted.is_ready
        and hosted.free_slots >= leaving.running_jobs
        and key[0] in records.workers
        and key[0] not in records.unreachable
        and key not in records.moves
    ]
    return min(found)[1] if found else None


def _started_elsewhere(
    scene: Scene, key: ReplicaKey, model: ModelRecord, avoid: frozenset[WorkerId]
) -> Transfer | None:
    fleet = scene.fleet
    want = Want(model, Urgency.KEEP, scene.now_unix_s, rules=fleet.rules_of(key[1]))
    if not may_be_free(fleet, want):
        return None
    found = []
    for worker_id in Search(fleet, want).free(most=2 + len(avoid)):
        if worker_id not in avoid:
            node_id = fleet.records.workers[worker_id].node_id
            start = predict(scene, model, node_id)
            if start is not None:
                cost_s = push_out_s(scene, model, node_id, start)
                found.append(Transfer(key, worker_id, start.total_s, start, cost_s))
    return min(found, key=lambda each: (each.seconds + each.cost_s, each.target), default=None)
