"""Places for a model that needs several accelerators of one node: whole, or not at all."""

from gearfall.core.ids import WorkerId
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.placement.placement_search import Search
from gearfall.scheduling.placement.room_making import Room, room_on
from gearfall.scheduling.scene import Scene

_NODES_EXAMINED = 8
_NEVER_S = float("inf")


def find_groups(scene: Scene, want: Want, search: Search) -> list[tuple[WorkerId, ...]]:
    """Return a group of workers for each promising node, those with least trouble in it.

    The one that runs the engine comes first. Nodes with free room come before those where room
    would have to be made.
    """
    kinds = ["free"]
    if want.urgency >= Urgency.GEAR:
        kinds.append("idle")
    if want.urgency is Urgency.INTERACTIVE:
        kinds.append("busy")
    size = want.rules.accelerators
    groups: list[tuple[WorkerId, ...]] = []
    for kind in kinds:
        for workers in search.nodes_with(kind, size, _NODES_EXAMINED):
            group = _easiest(scene, want, workers, size)
            if group is not None and group not in groups:
                groups.append(group)
    return groups


def _easiest(
    scene: Scene, want: Want, workers: tuple[WorkerId, ...], size: int
) -> tuple[WorkerId, ...] | None:
    rooms = [(room_on(scene, want, each, _NEVER_S), each) for each in workers]
    found = sorted((_trouble(room), each) for room, each in rooms if room is not None)
    return tuple(sorted(each for _, each in found[:size])) if len(found) >= size else None


def _trouble(room: Room) -> tuple[float, int]:
    return (room.wait_s + room.cost_s, room.way)
