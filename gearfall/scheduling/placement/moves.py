"""What comes next for a replica under way to another worker: pure, from the records alone.

A new leader finds a move in cluster state and goes on as its own leader would have:

assigned at source | at target            | next
yes                | not assigned         | START there, or GIVE_UP when it no longer fits
yes                | coming up            | WAIT
yes                | ready, or idle here  | LEAVE: the worker moves the jobs alive, then drains
no                 | replica still leaves | WAIT
no                 | it is gone           | FINISH: the model that it made room for starts
"""

from enum import Enum

from gearfall.core.ids import WorkerId
from gearfall.core.records import MoveRecord
from gearfall.scheduling.scene import Scene
from gearfall.scheduling.snapshot import Hosted

MOST_S = 120.0
"""A move that takes longer is given up."""


class MoveStep(Enum):
    """What to do about a move now."""

    START = "start"
    WAIT = "wait"
    LEAVE = "leave"
    FINISH = "finish"
    GIVE_UP = "give up"


def next_step(scene: Scene, move: MoveRecord, *, is_wanted: bool) -> tuple[MoveStep, str]:
    """Return what comes next, and why. `is_wanted`: the model it makes room for still waits."""
    fleet = scene.fleet
    source = (move.worker_id, move.model)
    if scene.now_unix_s >= move.began_unix_s + MOST_S:
        return MoveStep.GIVE_UP, f"took longer than {MOST_S:g} s"
    if source not in fleet.records.assignments:
        if source in fleet.records.replicas:
            return MoveStep.WAIT, "its replica is leaving"
        return MoveStep.FINISH, "its room is free"
    if reason := _why_pointless(scene, move, is_wanted=is_wanted):
        return MoveStep.GIVE_UP, reason
    hosted = fleet.index.hosted[move.model]
    leaving, arriving = hosted[source], hosted.get((move.target, move.model))
    if leaving.is_idle:
        return MoveStep.LEAVE, "has no jobs left to move"
    return _by_target(scene, move, arriving)


def _by_target(scene: Scene, move: MoveRecord, arriving: Hosted | None) -> tuple[MoveStep, str]:
    if arriving is None:
        if (move.target, move.model) in scene.fleet.records.replicas:
            return MoveStep.GIVE_UP, f"it is leaving worker {move.target}"
        return MoveStep.START, f"not yet on worker {move.target}"
    if arriving.is_failing:
        return MoveStep.GIVE_UP, f"does not start on worker {move.target}"
    if arriving.is_ready:
        return MoveStep.LEAVE, f"is ready on worker {move.target}"
    return MoveStep.WAIT, f"starts on worker {move.target}"


def _why_pointless(scene: Scene, move: MoveRecord, *, is_wanted: bool) -> str:
    if not is_wanted:
        return f"{move.for_model} no longer waits for it"
    if scene.fleet.model(move.model) is None:
        return f"model {move.model} was removed"
    for worker_id in (move.worker_id, move.target):
        if not _takes_part(scene, worker_id):
            return f"worker {worker_id} is not there"
    return ""


def _takes_part(scene: Scene, worker_id: WorkerId) -> bool:
    records = scene.fleet.records
    worker = records.workers.get(worker_id)
    return worker is not None and worker.max_replicas > 0 and worker_id not in records.unreachable
