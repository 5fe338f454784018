"""Why a replica starts where it does, and why not elsewhere, in words and numbers."""

from gearfall.core.ids import WorkerId
from gearfall.scheduling.fleet.wants import Want
from gearfall.scheduling.placement.options import Option
from gearfall.scheduling.placement.placement_search import Search
from gearfall.scheduling.placement.room_making import Way
from gearfall.scheduling.scene import Scene, needed_bytes

Rejected = tuple[tuple[str, str], ...]
"""(alternative, why not), best first."""

KEPT_REJECTED = 16
_EXAMPLES = 3
"""Of a large fleet's workers that are full, and of those that never can, named as examples."""
_SHOWN_ERROR_CHARACTERS = 200


def name_of(workers: tuple[WorkerId, ...]) -> str:
    """Return a place in words."""
    return f"worker {workers[0]}" if len(workers) == 1 else f"workers {', '.join(workers)}"


def why_chosen(option: Option) -> str:
    """Return the reason for an option. Of one that waits it holds no figure that changes daily."""
    place = name_of(option.workers)
    if option.way is Way.FREE:
        return f"{place} starts soonest, in {option.prediction.terms()}"
    if option.way is Way.AWAIT:
        if option.ending:
            return f"waits until {', '.join(option.ending)} has ended on {place}"
        return f"room is being made on {place}"
    steps = []
    if option.transfers:
        moves = ", ".join(f"{each.key[1]} to worker {each.target}" for each in option.transfers)
        steps.append(f"moves {moves}")
    if option.victims:
        steps.append(f"gives back {', '.join(each.key[1] for each in option.victims)}")
    return f"{' and '.join(steps)} on {place} first"


def why_not(option: Option) -> tuple[str, str]:
    """Return an option as an alternative that was not taken."""
    terms = option.prediction.terms()
    place = name_of(option.workers)
    if option.way is Way.FREE:
        return place, f"starts in {terms}"
    how = why_chosen(option)
    cost = f", costs others {option.cost_s:.2f} s" if option.cost_s else ""
    room = f"{how}: room in {option.wait_s:.2f} s"
    if option.fetches_ahead and option.prediction.load_s:
        ready = f"ready in {option.seconds:.2f} s"
        return place, f"{room} and its bytes meanwhile, {ready}; without a wait {terms}{cost}"
    return place, f"{room}, then {terms}{cost}"


def rejected_by(
    scene: Scene, want: Want, search: Search, chosen: Option | None, others: list[Option]
) -> Rejected:
    """Return what was not chosen and why: the other options, the full, those that never can."""
    notes = [why_not(option) for option in others[:KEPT_REJECTED]]
    is_small = len(scene.fleet.rows) <= KEPT_REJECTED
    left = KEPT_REJECTED - len(notes) if is_small else _EXAMPLES
    if left > 0:
        known = [each for option in others for each in option.workers]
        full, never = search.left_out(left, (*known, *(chosen.workers if chosen else ())))
        notes += sorted((name_of((each,)), _why_full(scene, want, each)) for each in full)
        notes += sorted((name_of((each,)), _why_never(scene, want, each)) for each in never)
    return tuple(notes[:KEPT_REJECTED])


def _why_full(scene: Scene, want: Want, worker_id: WorkerId) -> str:
    fleet = scene.fleet
    worker, row = fleet.records.workers[worker_id], fleet.rows.get(worker_id)
    if obstacle := _worker_obstacle(scene, want, worker_id):
        return obstacle
    hosted = len(fleet.index.held.get(worker_id, ()))
    claims = ", with those that room is made for" * bool(fleet.claims.on(worker_id))
    if row.free_replicas < 1:
        hosted += len(fleet.claims.on(worker_id))
        return f"hosts {hosted} of at most {worker.max_replicas} replicas{claims}"
    need = needed_bytes(fleet, want, worker_id)
    if row.free_bytes < need:
        return f"needs {need} bytes, {int(row.free_bytes)} are free{claims}"
    if want.rules.accelerators > 1:
        return "has room, but not enough accelerators of its node have"
    return "has room, and starts later by its store's figures"


def _why_never(scene: Scene, want: Want, worker_id: WorkerId) -> str:
    fleet, model = scene.fleet, want.model
    node_id = fleet.records.workers[worker_id].node_id
    if obstacle := _worker_obstacle(scene, want, worker_id):
        return obstacle
    node = fleet.records.nodes.get(node_id)
    if node is None:
        return f"the store of node {node_id} is not there"
    if model.size_bytes > node.dram_capacity_bytes:
        pool = node.dram_capacity_bytes
        return f"the pool of node {node_id} takes {pool} bytes, the model has {model.size_bytes}"
    if model.name in (*node.resident, *(node.on_ssd or ())):
        return f"node {node_id} has other bytes under that name"
    return f"node {node_id} does not hold the checkpoint, and no live node or URL gives it"


def _worker_obstacle(scene: Scene, want: Want, worker_id: WorkerId) -> str:
    fleet, name = scene.fleet, want.model.name
    worker = fleet.records.workers[worker_id]
    if worker_id in fleet.records.unreachable:
        return "its connection is broken"
    if worker.max_replicas < 1:
        return "it takes no replicas"
    if worker_id in fleet.index.holders.get(name, ()):
        return _why_hosting(scene, want, worker_id)
    if not want.rules.allow(worker):
        wanted = ", ".join(f"{label}={value}" for label, value in want.rules.labels)
        return f"its labels do not match {wanted}"
    need = needed_bytes(fleet, want, worker_id)
    if need > worker.memory_bytes:
        return f"needs {need} bytes, it has {worker.memory_bytes} in all"
    return ""


def _why_hosting(scene: Scene, want: Want, worker_id: WorkerId) -> str:
    hosted = scene.fleet.index.hosted.get(want.model.name, {}).get((worker_id, want.model.name))
    if hosted is None:
        return "its replica is still leaving"
    if hosted.is_failing and hosted.replica is not None:
        return f"its replica does not start: {hosted.replica.error[:_SHOWN_ERROR_CHARACTERS]}"
    return "it hosts the model already"
