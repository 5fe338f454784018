"""The part of a decision step that follows gear plans: whose wishes changed is looked at again."""

from gearfall.core.ids import ModelName, NodeId
from gearfall.scheduling.scaling.gear_wishes import gear_wishes
from gearfall.scheduling.scene import Scene, predict

LOOK_S = 10.0
"""A model's start takes another time once its bytes are elsewhere, of which no gear tells."""


def follow_gears(scene: Scene) -> bool:
    """Bring what gear plans want up to date, and have every model looked at that it changed for.

    The rows have to be up to date; True when they are no longer.
    """
    fleet = scene.fleet
    is_due = bool(fleet.records.gear_plans) and scene.now_unix_s >= fleet.gears_due_unix_s
    if not (fleet.gears_changed or is_due):
        return False
    fleet.gears_changed = False
    fleet.gears_due_unix_s = scene.now_unix_s + LOOK_S
    records = fleet.records
    found = gear_wishes(
        fleet.plan_shelf.read(records.gear_plans, records.gear_votes, fleet.index.workers.keys()),
        records.deployments,
        host_of=fleet.host_of,
        start_s=lambda model, node_id: _start_s(scene, model, node_id),
        shift_s=scene.policy.gear_shift_s,
    )
    changed = {
        model
        for model in found.keys() | fleet.gears.keys()
        if found.get(model) != fleet.gears.get(model)
    }
    fleet.gears = found
    for model in changed:
        fleet.forget_limits(model)
    fleet.dirty_models |= changed
    return bool(changed)


def _start_s(scene: Scene, model: ModelName, node_id: NodeId) -> float:
    """Return the expected start; 0 where the model can't be started at all."""
    record, has_workers = scene.fleet.model(model), node_id in scene.fleet.index.workers
    start = predict(scene, record, node_id) if record is not None and has_workers else None
    return start.total_s if start is not None else 0.0
