"""Who of those that found no room is looked at again, now that some workers offer more.

Nothing else changed for them: only the workers that grew are looked at. For each kind of room
(free, had by idle ones going, had by busy ones moving) only the first few that fit: one worker's
room is soon taken, and whoever is left waits for the next.
"""

from collections.abc import Iterable

from gearfall.core.ids import ModelName, WorkerId
from gearfall.scheduling.fleet_state import FleetState
from gearfall.scheduling.scene import claimed_bytes, needed_bytes
from gearfall.scheduling.wants import Urgency, Want

_KINDS = {"free": 2, "idle": 2, "busy": 1}
"""How many a grown worker is offered to, by kind of room."""


def reopen(fleet: FleetState) -> dict[ModelName, list[WorkerId]]:
    """Return the blocked models to look at again, and where; forget who offers more."""
    grown = sorted(each for each in fleet.grown if each in fleet.rows)
    fleet.grown.clear()
    if not fleet.blocked or not grown:
        return {}
    found = _claimants(fleet, grown)
    left = {kind: most * len(grown) for kind, most in _KINDS.items()}
    for model, want in fleet.blocked.items():
        if model in found:
            continue
        kind, workers = _best_room(fleet, want, grown)
        if workers and left[kind] > 0:
            left[kind] -= 1
            claim = fleet.claims.of(model)
            found[model] = sorted({*workers, *(claim.bytes_by_worker if claim else ())})
            if not any(left.values()):
                break
    return found


def _claimants(fleet: FleetState, workers: Iterable[WorkerId]) -> dict[ModelName, list[WorkerId]]:
    """Return those whom room is being made for on one of these workers, and where."""
    found = {}
    for worker_id in workers:
        for model in fleet.claims.on(worker_id):
            claim = fleet.claims.of(model)
            if model in fleet.blocked and claim is not None:
                found[model] = sorted(claim.bytes_by_worker)
    return found


def _best_room(
    fleet: FleetState, want: Want, workers: Iterable[WorkerId]
) -> tuple[str, list[WorkerId]]:
    able = [each for each in workers if _has_room(fleet, want, each, _widest(want))]
    able = [each for each in able if _can_host(fleet, want, each)]
    for kind in _KINDS:
        if found := [each for each in able if _has_room(fleet, want, each, kind)]:
            return kind, found
        if kind == _widest(want):
            break
    return "", []


def _widest(want: Want) -> str:
    if want.urgency is Urgency.INTERACTIVE:
        return "busy"
    return "idle" if want.urgency is Urgency.EVACUATE else "free"


def _has_room(fleet: FleetState, want: Want, worker_id: WorkerId, kind: str) -> bool:
    own = claimed_bytes(fleet, want.model.name, worker_id)
    replicas = fleet.rows.number(worker_id, f"{kind}_replicas") + (own is not None)
    has_bytes = fleet.rows.number(worker_id, f"{kind}_bytes") + (own or 0)
    return replicas >= 1 and has_bytes >= needed_bytes(fleet, want, worker_id)


def _can_host(fleet: FleetState, want: Want, worker_id: WorkerId) -> bool:
    worker = fleet.records.workers[worker_id]
    node = fleet.records.nodes.get(worker.node_id)
    return (
        node is not None
        and node.dram_capacity_bytes >= want.model.size_bytes
        and want.rules.allow(worker)
        and worker_id not in fleet.index.holders.get(want.model.name, ())
        and fleet.source_tier(want.model, worker.node_id) is not None
    )
