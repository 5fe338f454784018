"""One running job and the parties to it: who asked for it, who works on it, what is replied."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from gearfall.core.errors import DeadlineExceeded, GearfallError, Overloaded, Unavailable
from gearfall.core.generation.job import FinishReason, Job, TokenRun
from gearfall.core.generation.token_log import TokenLog
from gearfall.core.ids import Epoch, JobId, ModelName, WorkerId
from services.router.jobs.backlog import Backlog


@dataclass(frozen=True, slots=True)
class Stop:
    """To a worker: stop working on (job, epoch) and acknowledge its entry."""

    job_id: JobId
    epoch: Epoch
    reason: str
    handed_over: bool = False
    """Another worker is the owner now, as this one had asked."""


@dataclass(frozen=True, slots=True)
class Granted:
    """To a handover's target: it is the owner of (job, epoch)."""

    job_id: JobId
    epoch: Epoch
    next_index: int


@dataclass(frozen=True, slots=True)
class Kept:
    """To a handover's sender: it is the owner as before."""

    job_id: JobId
    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """To a worker: the final run is in the log, acknowledge the entry."""

    job_id: JobId
    epoch: Epoch


Reply = Stop | Finished | Granted | Kept


class JobListener(Protocol):
    """Who asked for a job; called on the event loop, must not block."""

    def on_bound(self, worker: WorkerId, epoch: Epoch, held_s: float) -> None:
        """A worker took the job, so many seconds ago."""
        ...

    def on_moved(self, worker: WorkerId, epoch: Epoch) -> None:
        """Another worker owns the job from here on; no token was lost and nothing waits."""
        ...

    def on_run(self, run: TokenRun) -> None:
        """New tokens, each exactly once and in order; the last run has `finish`."""
        ...

    def on_lost(self, epoch: Epoch, reason: str) -> None:
        """The owner is gone; the job goes on under the next epoch."""
        ...

    def on_failed(self, error: GearfallError) -> None:
        """The job ended without a final run."""
        ...


class WaitingRoom(Protocol):
    """Told whenever the unclaimed jobs of a model change."""

    def set_waiting(self, model: ModelName, backlog: Backlog) -> None:
        """`backlog` is what waits for a worker now."""
        ...


class LoadMeter(Protocol):
    """Told what comes for each model and what comes out of it."""

    def arrived(self, model: ModelName, prompt_tokens: int) -> None:
        """A job came."""
        ...

    def produced(self, model: ModelName, tokens: int) -> None:
        """A job that came got tokens."""
        ...

    def ended(self, model: ModelName) -> None:
        """A job that came is over."""
        ...


class WorkerLink:
    """One Push stream of one worker."""

    def __init__(
        self, worker_id: WorkerId, send: Callable[[Reply], None], end: Callable[[], None]
    ) -> None:
        """`send` queues a reply on the stream, `end` closes it; neither blocks."""
        self.worker_id = worker_id
        self.send = send
        self.end = end
        self.jobs: set[JobId] = set()


class RunningJob:
    """One job with its token log. Changed by the table only."""

    __slots__ = ("deadline_s", "entry_id", "job", "link", "listener", "log", "waits_since_s")

    def __init__(self, job: Job, listener: JobListener, deadline_s: float, now_s: float) -> None:
        """`deadline_s` and `now_s`: on the loop's clock."""
        self.job = job
        self.listener = listener
        self.log = TokenLog(job.job_id)
        self.deadline_s = deadline_s
        self.entry_id: str | None = None
        """Of the newest epoch; None while it is being appended."""
        self.link: WorkerLink | None = None
        self.waits_since_s = now_s


def job_now(running: RunningJob) -> Job:
    """Return the job as it goes to the queue now: current epoch, with its log."""
    return replace(
        running.job,
        epoch=running.log.epoch,
        generated_token_ids=tuple(running.log.token_ids),
        enqueued_unix_s=time.time(),
    )


def finish_of_log(running: RunningJob) -> FinishReason | None:
    """Whether the log is already a whole answer, its owner having died before it said so."""
    sampling, token_ids = running.job.sampling, running.log.token_ids
    if token_ids and not sampling.ignore_eos and token_ids[-1] in sampling.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(token_ids) >= sampling.max_tokens else None


def gave_up(error: GearfallError, *, is_deadline: bool) -> GearfallError:
    """Return what a job ends with that could not be put into its queue."""
    if is_deadline:
        return DeadlineExceeded("the queue could not be reached before the request's deadline")
    if isinstance(error, Overloaded):
        return Overloaded(f"the job queue is full: {error.message}", retry_after_s=1.0)
    return Unavailable(f"the job queue can't be reached: {error.message}", retry_after_s=1.0)
