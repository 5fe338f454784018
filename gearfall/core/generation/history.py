"""What processes write down about the jobs they handle, so that a run can be judged afterwards.

A process writes its own events in the order in which they happened; between processes there is no
order. `gearfall.infra.history_log` writes and reads them, `verdict` judges them.
"""

import hashlib
from dataclasses import dataclass, replace

import msgspec

from gearfall.core.generation.job import Job
from gearfall.core.ids import Epoch, JobId, ModelName, WorkerId


class Event(msgspec.Struct, frozen=True, tag=True, tag_field="event"):
    """One thing that happened; written as one JSON object."""


class ProcessStarted(Event, frozen=True, tag=True, tag_field="event"):
    """First event of each process."""

    service: str
    pid: int
    parent_pid: int
    start_ticks: int
    """When it started, in the kernel's ticks since boot: tells it from a later one of its id."""


class ProcessEnded(Event, frozen=True, tag=True, tag_field="event"):
    """Last event of a process that ended in order."""


class Accepted(Event, frozen=True, tag=True, tag_field="event"):
    """A router answers for a job from here on."""

    job_id: JobId
    model: ModelName
    digest: str
    """Of all that its tokens depend on: equal digests mean equal tokens."""


class Bound(Event, frozen=True, tag=True, tag_field="event"):
    """A worker owns a job that nobody owned."""

    job_id: JobId
    epoch: Epoch
    worker_id: WorkerId


class Appended(Event, frozen=True, tag=True, tag_field="event"):
    """Tokens of the owner went into the log and to the client."""

    job_id: JobId
    epoch: Epoch
    worker_id: WorkerId
    index: int
    token_ids: tuple[int, ...]


class HandedOver(Event, frozen=True, tag=True, tag_field="event"):
    """The owner gave the job to another worker, which owns it under `epoch`."""

    job_id: JobId
    epoch: Epoch
    source_id: WorkerId
    target_id: WorkerId


class Lost(Event, frozen=True, tag=True, tag_field="event"):
    """Nobody owns the job now; whoever claims it owns it under `epoch`."""

    job_id: JobId
    epoch: Epoch


class Ended(Event, frozen=True, tag=True, tag_field="event"):
    """The job is over for its router."""

    job_id: JobId
    reason: str
    """`stop` or `length` for an answer that is whole, else why it is not."""


class Claimed(Event, frozen=True, tag=True, tag_field="event"):
    """A worker took the job's queue entry."""

    job_id: JobId
    epoch: Epoch


class Submitted(Event, frozen=True, tag=True, tag_field="event"):
    """A worker gave the job to its engine to run."""

    job_id: JobId
    epoch: Epoch


class Held(Event, frozen=True, tag=True, tag_field="event"):
    """A worker gave the job to its engine to hold."""

    job_id: JobId
    epoch: Epoch


class Released(Event, frozen=True, tag=True, tag_field="event"):
    """A worker let its engine run a held job."""

    job_id: JobId
    epoch: Epoch


class Cancelled(Event, frozen=True, tag=True, tag_field="event"):
    """A worker told its engine to drop the job."""

    job_id: JobId
    epoch: Epoch


class Settled(Event, frozen=True, tag=True, tag_field="event"):
    """A worker is done with the job and its queue entries."""

    job_id: JobId
    epoch: Epoch


class Led(Event, frozen=True, tag=True, tag_field="event"):
    """A scheduler leads from here on."""

    fence: int
    """Its election revision."""


class Wrote(Event, frozen=True, tag=True, tag_field="event"):
    """A leader's write to cluster state was taken."""

    kind: str
    key: str
    fence: int
    revision: int
    """That it got; 0 where there was nothing to delete."""


class Refused(Event, frozen=True, tag=True, tag_field="event"):
    """A leader's write met another leader's fence: nothing was written."""

    kind: str
    key: str
    fence: int


class Holding(Event, frozen=True, tag=True, tag_field="event"):
    """What the process has taken and not given back: slots, blocks, leases, each by its name."""

    counts: dict[str, int]


class Answered(Event, frozen=True, tag=True, tag_field="event"):
    """What a client received; equal names mean requests for the same answer."""

    name: str
    token_ids: tuple[int, ...]
    is_whole: bool
    """Whether the answer ended, and not with an error."""


AnyEvent = (
    ProcessStarted
    | ProcessEnded
    | Accepted
    | Bound
    | Appended
    | HandedOver
    | Lost
    | Ended
    | Claimed
    | Submitted
    | Held
    | Released
    | Cancelled
    | Settled
    | Led
    | Wrote
    | Refused
    | Holding
    | Answered
)


@dataclass(frozen=True, slots=True)
class ProcessHistory:
    """All events of one process."""

    start: ProcessStarted
    events: tuple[AnyEvent, ...]
    """Without the start."""

    @property
    def has_ended(self) -> bool:
        """Whether it ended in order."""
        return bool(self.events) and isinstance(self.events[-1], ProcessEnded)


def accepted(job: Job) -> Accepted:
    """Return the event for a job that a router takes in."""
    # What a greedy answer would be drawn with changes nothing.
    sampling = replace(job.sampling, seed=0) if job.sampling.is_greedy else job.sampling
    facts = (job.model, job.adapter, job.prompt_token_ids, sampling)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Accepted(job.job_id, job.model, digest)
