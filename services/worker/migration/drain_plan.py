"""Which jobs leave a draining worker first, and where to. Pure.

Most valuable first: interactive before batch, then those with most tokens computed, whose loss
would cost most to compute again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gearfall.core.generation.job import Priority
from gearfall.core.ids import Epoch, JobId, ModelName, WorkerId
from gearfall.core.records import ReplicaRecord, ReplicaState, WorkerRecord

MOST_ATTEMPTS = 2
"""How often one job is offered to one worker."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """A job that runs on the worker that drains."""

    job_id: JobId
    epoch: Epoch
    priority: Priority
    tokens: int
    """Prompt and answer so far."""


@dataclass(frozen=True, slots=True)
class Room:
    """A worker that serves the model and may have slots for its jobs."""

    worker_id: WorkerId
    address: str
    free_slots: int


def by_value(jobs: Iterable[Leaving]) -> list[Leaving]:
    """Return the jobs in the order in which they are to leave."""
    return sorted(jobs, key=lambda job: (job.priority is Priority.BATCH, -job.tokens, job.job_id))


def rooms_for(
    model: ModelName,
    own: WorkerId,
    replicas: Mapping[tuple[WorkerId, ModelName], ReplicaRecord],
    workers: Mapping[WorkerId, WorkerRecord],
) -> list[Room]:
    """Return the other workers where the model is ready; those that drain take nothing."""
    return [
        Room(worker, workers[worker].address, record.slots - record.running_jobs)
        for (worker, hosted), record in replicas.items()
        if hosted == model
        and worker != own
        and record.state is ReplicaState.READY
        and worker in workers
        and workers[worker].max_replicas > 0
    ]


def choose_room(
    rooms: Iterable[Room], taken: Mapping[WorkerId, int], attempts: Mapping[WorkerId, int]
) -> Room | None:
    """Return the room with most slots free for a job, None when it was offered to all.

    `taken`: slots that are being filled from here. A worker whose record shows no slot is tried
    last: the record may be a second old.
    """
    candidates = [room for room in rooms if attempts.get(room.worker_id, 0) < MOST_ATTEMPTS]

    def rank(room: Room) -> tuple[int, int, str]:
        free = room.free_slots - taken.get(room.worker_id, 0)
        return (attempts.get(room.worker_id, 0), -free, room.worker_id)

    return min(candidates, key=rank, default=None)
