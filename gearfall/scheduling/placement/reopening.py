"""Who of those that found no room is looked at again, now that some workers offer more.

Nothing else changed for them: only the workers that grew are looked at. For each kind of room
(free, had by idle ones going, had by busy ones moving) only the first few that fit, and a few more
whose bytes the node has in memory: one worker's room is soon taken, and whoever is left waits for
the next.
"""

from collections.abc import Iterable
from itertools import islice

from gearfall.core.ids import ModelName, WorkerId
from gearfall.scheduling.fleet.fleet_state import FleetState
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.fleet.worker_rows import WorkerRow
from gearfall.scheduling.scene import needed_bytes

_KINDS = {"free": 2, "idle": 2, "busy": 1}
"""How many a grown worker is offered to, by kind of room."""
_NEAR = 4
"""How many more a grown worker is offered to because their bytes are in its node's memory."""
_ORDER = {kind: number for number, kind in enumerate(_KINDS)}


def reopen(fleet: FleetState) -> dict[ModelName, list[WorkerId]]:
    """Return the blocked models to look at again, and where; forget who offers more."""
    grown = sorted(each for each in fleet.grown if each in fleet.rows)
    fleet.grown.clear()
    if not fleet.blocked or not grown:
        return {}
    found = _claimants(fleet, grown)
    rows = [(each, fleet.rows.get(each)) for each in grown]
    offers = [(each, row) for each, row in rows if row.busy_replicas >= 1]
    left = {kind: most * len(offers) for kind, most in _KINDS.items()}
    near = _near(fleet, [each for each, _ in offers])
    blocked = {**{m: want for m, want in fleet.blocked.items() if m in near}, **fleet.blocked}
    for model, want in blocked.items() if offers else ():
        if model in found:
            continue
        kind, workers = _best_room(fleet, want, offers)
        if workers and (model in near or left[kind] > 0):
            left[kind] -= model not in near
            found[model] = sorted({*workers, *fleet.claims.workers_of(model)})
            if not any(left.values()):
                break
    return found


def _near(fleet: FleetState, workers: list[WorkerId]) -> set[ModelName]:
    """Return those whose bytes are in memory beside one of these workers, longest blocked first."""
    found: set[ModelName] = set()
    for worker_id in workers:
        node_id = fleet.records.workers[worker_id].node_id
        resident = (m for m in fleet.blocked if node_id in fleet.index.resident.get(m, ()))
        found.update(islice(resident, _NEAR))
    return found


def _claimants(fleet: FleetState, workers: Iterable[WorkerId]) -> dict[ModelName, list[WorkerId]]:
    """Return those whom room is being made for on one of these workers, and where."""
    found = {}
    for worker_id in workers:
        for model in fleet.claims.on(worker_id):
            if model in fleet.blocked:
                found[model] = sorted(fleet.claims.workers_of(model))
    return found


def _best_room(
    fleet: FleetState, want: Want, offers: list[tuple[WorkerId, WorkerRow]]
) -> tuple[str, list[WorkerId]]:
    """Return the easiest kind of room that it may have on any of the workers, and on which."""
    best, workers = "", list[WorkerId]()
    for worker_id, row in offers:
        kind = _room_in(row, needed_bytes(fleet, want, worker_id), want.urgency)
        if (
            kind
            and (not best or _ORDER[kind] <= _ORDER[best])
            and _can_host(fleet, want, worker_id)
        ):
            workers = [*workers, worker_id] if kind == best else [worker_id]
            best = kind
    return best, workers


def _room_in(row: WorkerRow, size_bytes: int, urgency: Urgency) -> str:
    if row.free_replicas >= 1 and row.free_bytes >= size_bytes:
        return "free"
    if urgency < Urgency.GEAR:
        return ""
    if row.idle_replicas >= 1 and row.idle_bytes >= size_bytes:
        return "idle"
    return "busy" if urgency is Urgency.INTERACTIVE and row.busy_bytes >= size_bytes else ""


def _can_host(fleet: FleetState, want: Want, worker_id: WorkerId) -> bool:
    worker = fleet.records.workers[worker_id]
    node = fleet.records.nodes.get(worker.node_id)
    return (
        node is not None
        and node.dram_capacity_bytes >= want.model.size_bytes
        and want.rules.allow(worker)
        and want.node_id in {None, worker.node_id}
        and worker_id not in fleet.index.holders.get(want.model.name, ())
        and fleet.source_tier(want.model, worker.node_id) is not None
    )
