"""What a changed record touches: the index, models to look at again, workers' rows."""

from collections.abc import Callable, Mapping
from typing import Any

from gearfall.core.gears.gear_records import GearVoteRecord
from gearfall.core.ids import ModelName
from gearfall.core.records import (
    AssignmentRecord,
    DecisionRecord,
    DemandRecord,
    DeploymentRecord,
    LoadRecord,
    ModelRecord,
    MoveRecord,
    NodeRecord,
    ReplicaRecord,
    ReplicaState,
    WorkerRecord,
)
from gearfall.core.tiers import Tier
from gearfall.scheduling.fleet.fleet_state import FleetState
from gearfall.scheduling.snapshot import ReplicaKey


def note_change(fleet: FleetState, kind: str, record_id: Any, before: Any, now: Any) -> None:
    """Note that a record changed; `before` or `now` is None where there was or is none."""
    if kind == "assignments":
        _note_assignment(fleet, record_id, before, now)
    elif kind == "replicas":
        _note_replica(fleet, record_id, before, now)
    elif kind in _NOTES:
        _NOTES[kind](fleet, before, now)


def _touch_model(fleet: FleetState, name: ModelName) -> None:
    """Look at a model again, or at the base of an adapter."""
    record = fleet.records.models.get(name)
    fleet.dirty_models.add(ModelName(record.base) if record and record.base else name)


def _note_model(fleet: FleetState, before: ModelRecord | None, now: ModelRecord | None) -> None:
    fleet.index.note_model(before, now)
    for record in (before, now):
        if record is None:
            continue
        for name in (record.name, ModelName(record.base or record.name)):
            fleet.forget_limits(name)
            fleet.forget_needs(name)
            fleet.dirty_models.add(name)
        for worker_id in fleet.index.holders.get(record.name, ()):
            fleet.touch_worker(worker_id)
            if (worker := fleet.records.workers.get(worker_id)) is not None:
                fleet.touch_node(worker.node_id)


def _note_deployment(
    fleet: FleetState, before: DeploymentRecord | None, now: DeploymentRecord | None
) -> None:
    fleet.index.note_deployment(before, now)
    for stage in (*(before.stages if before else ()), *(now.stages if now else ())):
        record = fleet.records.models.get(stage.model)
        fleet.forget_limits(stage.model)
        if record is not None and record.base:
            fleet.forget_limits(ModelName(record.base))
        _touch_model(fleet, stage.model)
    fleet.gears_changed = fleet.gears_changed or bool(fleet.records.gear_plans)


def _note_vote(
    fleet: FleetState, before: GearVoteRecord | None, now: GearVoteRecord | None
) -> None:
    """Most votes say only that the load is another one."""
    said = [(vote.version, vote.gear) if vote else None for vote in (before, now)]
    fleet.gears_changed = fleet.gears_changed or said[0] != said[1]


def _note_node(fleet: FleetState, before: NodeRecord | None, now: NodeRecord | None) -> None:
    present = now or before
    assert present is not None
    changed = fleet.index.note_node(before, now)
    fleet.touch_node(present.node_id)
    fleet.dirty_models |= changed & fleet.blocked.keys()
    if before is None or now is None:
        _note_membership(fleet, present)


def _note_membership(fleet: FleetState, node: NodeRecord) -> None:
    """A store came or went: others may now get bytes from it, or no longer."""
    for name in fleet.blocked:
        if node.node_id in fleet.index.listed.get(name, ()):
            fleet.dirty_models.add(name)
    for worker_id, _ in fleet.index.loading:
        if (worker := fleet.records.workers.get(worker_id)) is not None:
            fleet.touch_node(worker.node_id)


def _note_worker(fleet: FleetState, before: WorkerRecord | None, now: WorkerRecord | None) -> None:
    fleet.index.note_worker(before, now)
    if before is None or now is None:
        fleet.gears_changed = fleet.gears_changed or bool(fleet.records.gear_plans)
    for record in (before, now):
        if record is not None:
            fleet.touch_worker(record.worker_id)
            fleet.touch_node(record.node_id)
            fleet.dirty_models |= fleet.index.held.get(record.worker_id, set())


def _note_assignment(
    fleet: FleetState,
    key: ReplicaKey,
    before: AssignmentRecord | None,
    now: AssignmentRecord | None,
) -> None:
    replica = fleet.records.replicas.get(key)
    fleet.index.note_hosting(key, now, replica)
    is_loading = replica is None or replica.state is ReplicaState.LOADING
    _touch_hosting(fleet, key, is_loading and (before is None) != (now is None))
    for record in (before, now):
        fleet.dirty_workers |= set(record.group if record else ())


def _note_replica(
    fleet: FleetState, key: ReplicaKey, before: ReplicaRecord | None, now: ReplicaRecord | None
) -> None:
    assignment = fleet.records.assignments.get(key)
    fleet.index.note_hosting(key, assignment, now)
    was_loading = before is None or before.state is ReplicaState.LOADING
    is_loading = now is None or now.state is ReplicaState.LOADING
    _touch_hosting(fleet, key, assignment is not None and was_loading != is_loading)
    fleet.dirty_workers |= set(assignment.group if assignment else ())


def _touch_hosting(fleet: FleetState, key: ReplicaKey, loads_change: bool) -> None:
    fleet.dirty_models.add(key[1])
    fleet.touch_worker(key[0])
    for move in fleet.index.arriving.get(key, ()):
        fleet.dirty_models.add(fleet.records.moves[move].for_model)
    if key in fleet.records.moves:
        fleet.dirty_models.add(fleet.records.moves[key].for_model)
    worker, model = fleet.records.workers.get(key[0]), fleet.model(key[1])
    if loads_change and worker is not None:
        is_queued = model and fleet.source_tier(model, worker.node_id) is not Tier.DRAM
        if is_queued or model is None:
            fleet.touch_node(worker.node_id)


def _note_demand(fleet: FleetState, before: DemandRecord | None, now: DemandRecord | None) -> None:
    present = now or before
    assert present is not None
    fleet.index.note_demand(present.model, present.router_id, now)
    fleet.dirty_models.add(present.model)


def _note_load(fleet: FleetState, before: LoadRecord | None, now: LoadRecord | None) -> None:
    present = now or before
    assert present is not None
    fleet.index.note_load(present.model, present.router_id, now)
    fleet.dirty_models.add(present.model)


def _note_move(fleet: FleetState, before: MoveRecord | None, now: MoveRecord | None) -> None:
    fleet.index.note_move(before, now)
    for move in (before, now):
        if move is not None:
            fleet.dirty_models |= {move.model, move.for_model}
            fleet.touch_worker(move.worker_id)
            fleet.touch_worker(move.target)


def _note_decision(
    fleet: FleetState, _before: DecisionRecord | None, now: DecisionRecord | None
) -> None:
    """One that arrives after its model's removal goes too."""
    if now is not None and now.model not in fleet.records.models:
        fleet.dirty_models.add(now.model)


def _note_plan(fleet: FleetState, _before: object, _now: object) -> None:
    fleet.gears_changed = True


_NOTES: Mapping[str, Callable[[FleetState, Any, Any], None]] = {
    "models": _note_model,
    "deployments": _note_deployment,
    "nodes": _note_node,
    "workers": _note_worker,
    "demand": _note_demand,
    "load": _note_load,
    "moves": _note_move,
    "decisions": _note_decision,
    "gear_plans": _note_plan,
    "gear_votes": _note_vote,
}
"""By kind of record."""
