"""Who of those that found no room is looked at again, now that some workers offer more.

For each kind of room (free, had by idle ones going, had by busy ones moving) only the first few
that fit: one worker's room is soon taken, and whoever is left waits for the next.
"""

from gearfall.core.ids import ModelName, WorkerId
from gearfall.scheduling.fleet_state import FleetState
from gearfall.scheduling.scene import claimed_bytes, needed_bytes
from gearfall.scheduling.wants import Urgency, Want

_PER_WORKER = 8


def reopen(fleet: FleetState) -> set[ModelName]:
    """Return the blocked models to look at again, and forget who offers more."""
    grown = tuple(each for each in fleet.grown if each in fleet.rows)
    fleet.grown.clear()
    if not fleet.blocked or not grown:
        return set()
    most = _PER_WORKER * len(grown)
    found: set[ModelName] = set()
    left = {"free": most, "idle": most, "busy": most}
    for model, want in fleet.blocked.items():
        kind = _best_room(fleet, want, grown)
        if kind and left[kind] > 0:
            left[kind] -= 1
            found.add(model)
            if not any(left.values()):
                break
    return found


def _best_room(fleet: FleetState, want: Want, workers: tuple[WorkerId, ...]) -> str:
    kinds = ["free"]
    if want.urgency >= Urgency.EVACUATE:
        kinds.append("idle")
    if want.urgency is Urgency.INTERACTIVE:
        kinds.append("busy")
    for kind in kinds:
        if any(_has_room(fleet, want, each, kind) for each in workers):
            return kind
    return ""


def _has_room(fleet: FleetState, want: Want, worker_id: WorkerId, kind: str) -> bool:
    own = claimed_bytes(fleet, want.model.name, worker_id)
    replicas = fleet.rows.number(worker_id, f"{kind}_replicas") + (own is not None)
    has_bytes = fleet.rows.number(worker_id, f"{kind}_bytes") + (own or 0)
    return replicas >= 1 and has_bytes >= needed_bytes(fleet, want, worker_id)
