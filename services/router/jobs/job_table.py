"""The jobs this router answers for: token logs, owners, and their way back to the queue."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from gearfall.core.errors import GearfallError, Internal, Overloaded, Unavailable
from gearfall.core.generation import history, token_log
from gearfall.core.generation.job import FinishReason, Job, TokenRun
from gearfall.core.generation.token_log import Appended, Bound, Broken, LogState, Refused
from gearfall.core.ids import Epoch, JobId, ModelName, WorkerId
from gearfall.core.ports import JobQueue
from gearfall.infra.failpoints import failpoint
from gearfall.infra.history_log import record
from services.router.background import Background
from services.router.jobs.backlog import WaitingJobs
from services.router.jobs.running_job import (
    Finished,
    Granted,
    JobListener,
    Kept,
    LoadMeter,
    RunningJob,
    Stop,
    WaitingRoom,
    WorkerLink,
    finish_of_log,
    gave_up,
    job_now,
)

_log = logging.getLogger(__name__)
_RETRY_FIRST_S = 0.05
_RETRY_MOST_S = 1.0
_CHECKS_AT_ONCE = 64
_RECHECK_S = 0.15
"""When to look whether the queue gave a lost job back to the dead worker that had it: its blocked
claim may outlive it there by a moment."""


class JobTable:
    """Owner of all running jobs of this router. Promises 1 and 2 of the design hold here."""

    def __init__(
        self,
        queue: JobQueue,
        waiting_room: WaitingRoom,
        background: Background,
        *,
        load: LoadMeter | None = None,
        on_epoch_bumped: Callable[[ModelName], None] = lambda _: None,
    ) -> None:
        self._queue = queue
        self._waiting_room = waiting_room
        self._background = background
        self._load = load
        self._on_epoch_bumped = on_epoch_bumped
        self._jobs: dict[JobId, RunningJob] = {}
        self._links: dict[WorkerId, WorkerLink] = {}
        self._waiting: dict[ModelName, WaitingJobs] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def is_used(self, model: ModelName) -> bool:
        """Whether a running job needs `model`, be it an adapter."""
        return any(model in (each.job.model, each.job.adapter) for each in self._jobs.values())

    def waiting(self, model: ModelName) -> int:
        """Jobs of a model that no worker has yet."""
        waiting = self._waiting.get(model)
        return len(waiting) if waiting else 0

    async def submit(
        self,
        job: Job,
        listener: JobListener,
        *,
        deadline_s: float,
        patience_s: float,
        is_new: bool = True,
    ) -> None:
        """Append `job` to its model's queue, once the queue can be reached.

        Raises Unavailable when it could not for `patience_s` seconds, and Overloaded when the queue
        is full: at once for what `is_new`, else after that time too. The job is gone then.
        """
        now_s = asyncio.get_running_loop().time()
        running = RunningJob(job, listener, deadline_s, now_s)
        self._jobs[job.job_id] = running
        record(history.accepted, job)
        if self._load is not None:
            self._load.arrived(job.model, len(job.prompt_token_ids))
        self._set_waiting(running, waits=True)
        try:
            passing = (Unavailable,) if is_new else (Unavailable, Overloaded)
            await self._append(running, min(deadline_s, now_s + patience_s), *passing)
        except GearfallError as error:
            self._remove(running, error.message)
            raise

    def close(self, job_id: JobId, reason: str) -> None:
        """End a job early: stop its owner, or take it out of the queue. Idempotent."""
        running = self._jobs.get(job_id)
        if running is None:
            return
        epoch, link, entry_id = running.log.epoch, running.link, running.entry_id
        self._remove(running, reason)
        if link is not None:
            link.send(Stop(job_id, epoch, reason))
        elif entry_id is not None:
            self._background.spawn(self._cancel(running.job.model, entry_id), "cancel-entry")

    def open_link(self, link: WorkerLink) -> None:
        """A worker said hello: its older stream ends first and loses its jobs."""
        older = self._links.get(link.worker_id)
        if older is not None:
            self.close_link(older, "a newer stream of the same worker")
            older.end()
        self._links[link.worker_id] = link

    def close_link(self, link: WorkerLink, reason: str) -> None:
        """A stream ended: every job its worker owned goes back to the queue. Idempotent."""
        if self._links.get(link.worker_id) is link:
            del self._links[link.worker_id]
        for job_id in tuple(link.jobs):
            running = self._jobs.get(job_id)
            if running is not None:
                self._put_back(running, f"worker {link.worker_id}: {reason}")

    def end_links(self) -> None:
        """End every stream after what is queued on it: this router stops."""
        for link in tuple(self._links.values()):
            link.end()

    def claim(self, link: WorkerLink, job_id: JobId, epoch: Epoch, *, held_s: float = 0.0) -> None:
        """Bind the link's worker to (job, epoch), or tell it to stop.

        `held_s`: how long the claim had waited at the worker.
        """
        running = self._jobs.get(job_id)
        if running is None:
            link.send(Stop(job_id, epoch, "no such job here"))
            return
        failpoint("router.claim", job_id=job_id, model=running.job.model)
        verdict = running.log.claim(link.worker_id, epoch)
        if isinstance(verdict, Refused):
            link.send(Stop(job_id, epoch, verdict.reason))
        elif isinstance(verdict, Bound) and running.link is None:
            running.link = link
            link.jobs.add(job_id)
            record(history.Bound, job_id, epoch, link.worker_id)
            self._set_waiting(running, waits=False)
            running.listener.on_bound(link.worker_id, epoch, held_s)

    def take_run(self, link: WorkerLink, run: TokenRun) -> None:
        """Append a run to its log and pass on what is new, or tell the worker to stop."""
        running = self._jobs.get(run.job_id)
        if running is None:
            link.send(Stop(run.job_id, run.epoch, "no such job here"))
            return
        failpoint("router.push", job_id=run.job_id, model=running.job.model)
        gave_up = run.finish is FinishReason.CANCELLED
        verdict = running.log.append(link.worker_id, replace(run, finish=None) if gave_up else run)
        if isinstance(verdict, Refused):
            link.send(Stop(run.job_id, run.epoch, verdict.reason))
            return
        if isinstance(verdict, Appended):
            new = verdict.run
            record(
                history.Appended, new.job_id, new.epoch, link.worker_id, new.index, new.token_ids
            )
            if self._load is not None:
                self._load.produced(running.job.model, len(new.token_ids))
            self._deliver(running, link, new)
        reason = verdict.reason if isinstance(verdict, Broken) else "the worker gave the job up"
        if running.link is link and (gave_up or isinstance(verdict, Broken)):
            link.send(Stop(run.job_id, run.epoch, reason))
            self._put_back(running, reason)

    def take_lost(self, link: WorkerLink, job_id: JobId, epoch: Epoch, reason: str) -> None:
        """The engine that ran (job, epoch) died: put the job back from its log."""
        link.send(Stop(job_id, epoch, "fenced"))
        running = self._jobs.get(job_id)
        if running is not None and running.link is link and running.log.epoch == epoch:
            self._put_back(running, reason)

    def hand_over(
        self, link: WorkerLink, job_id: JobId, epoch: Epoch, next_index: int, target_id: WorkerId
    ) -> None:
        """Make the target of a migration the owner, or tell the sender that it still is."""
        running = self._jobs.get(job_id)
        if running is None or running.link is not link:
            link.send(Stop(job_id, epoch, "not the owner" if running else "no such job here"))
            return
        failpoint("router.commit", job_id=job_id, model=running.job.model)
        target = self._links.get(target_id)
        if target is None or target is link:
            link.send(Kept(job_id, epoch, f"worker {target_id} has no stream of its own here"))
            return
        verdict = running.log.hand_over(link.worker_id, epoch, next_index, target_id)
        if isinstance(verdict, token_log.HandedOver):
            self._move(running, link, target, epoch)
        elif isinstance(verdict, token_log.Kept):
            link.send(Kept(job_id, epoch, verdict.reason))
        else:
            link.send(Stop(job_id, epoch, verdict.reason))

    def fail_waiting(self, model: ModelName, error: GearfallError) -> None:
        """End every unclaimed job of a model that can't start."""
        waiting = self._waiting.get(model)
        for job_id in waiting.job_ids() if waiting else ():
            self._fail(self._jobs[job_id], error)

    async def check_entries(self, *, min_age_s: float) -> int:
        """Append again what the queue lost among jobs that wait for `min_age_s`; return how many.

        Raises Unavailable when the queue can't be reached.
        """
        old_s = asyncio.get_running_loop().time() - min_age_s
        waiting = [
            running
            for jobs in self._waiting.values()
            for running in (self._jobs[job_id] for job_id in jobs.job_ids())
            if running.entry_id is not None and running.waits_since_s <= old_s
        ]
        lost = 0
        for start in range(0, len(waiting), _CHECKS_AT_ONCE):
            batch = waiting[start : start + _CHECKS_AT_ONCE]
            lost += sum(await asyncio.gather(*(self._check_entry(each) for each in batch)))
        return lost

    def check(self) -> None:
        """Assert the invariant: owned jobs have a link, waiting ones are counted, none else."""
        for job_id, running in self._jobs.items():
            running.log.check()
            is_owned = running.log.state is LogState.OWNED
            assert is_owned == (running.link is not None)
            assert (running.log.state is LogState.WAITING) == (
                job_id in self._waiting.get(running.job.model, ())
            )
            assert running.link is None or job_id in running.link.jobs
        for waiting in self._waiting.values():
            assert waiting, "empty ones are dropped"
            waiting.check()

    def _deliver(self, running: RunningJob, link: WorkerLink, run: TokenRun) -> None:
        if run.finish is not None:
            failpoint("router.finish", job_id=run.job_id, model=running.job.model)
            self._remove(running, run.finish.value)
            link.send(Finished(run.job_id, run.epoch))
        try:
            running.listener.on_run(run)
        except Exception as error:
            _log.exception("could not take a token run", extra={"job_id": run.job_id})
            self.close(run.job_id, "internal error")
            running.listener.on_failed(Internal(f"internal error: {type(error).__name__}"))

    def _move(
        self, running: RunningJob, source: WorkerLink, target: WorkerLink, old_epoch: Epoch
    ) -> None:
        job_id, log = running.job.job_id, running.log
        record(history.HandedOver, job_id, log.epoch, source.worker_id, target.worker_id)
        self._unlink(running)
        running.link = target
        target.jobs.add(job_id)
        running.entry_id = None
        failpoint("router.release", job_id=job_id, model=running.job.model)
        # The target first: until it hears of it, nobody computes.
        target.send(Granted(job_id, log.epoch, len(log.token_ids)))
        source.send(Stop(job_id, old_epoch, f"moved to {target.worker_id}", handed_over=True))
        running.listener.on_moved(target.worker_id, log.epoch)

    def _put_back(self, running: RunningJob, reason: str) -> None:
        """Fence the owner and append the job again with its log, unless nothing is left to do."""
        epoch = running.log.epoch
        self._unlink(running)
        record(history.Lost, running.job.job_id, running.log.lose())
        running.entry_id = None
        self._on_epoch_bumped(running.job.model)
        _log.warning("job lost its owner", extra={"job_id": running.job.job_id, "reason": reason})
        finish = finish_of_log(running)
        if finish is not None:
            self._remove(running, finish.value)
            running.listener.on_run(
                TokenRun(running.job.job_id, epoch, len(running.log.token_ids), finish=finish)
            )
        elif running.log.is_poisoned:
            self._fail(running, Internal(f"the job's owners died without a token: {reason}"))
        else:
            running.waits_since_s = asyncio.get_running_loop().time()
            self._set_waiting(running, waits=True)
            running.listener.on_lost(epoch, reason)
            self._background.spawn(self._append_again(running), "append-again")

    async def _append_again(self, running: RunningJob) -> None:
        try:
            # A queue that is full refuses what is new, not what is on its way.
            await self._append(running, running.deadline_s, Unavailable, Overloaded)
        except GearfallError as error:
            self._fail(running, error)
            return
        await asyncio.sleep(_RECHECK_S)
        with contextlib.suppress(Unavailable):  # looked at again by `check_entries`
            await self._check_entry(running)

    async def _append(
        self, running: RunningJob, until_s: float, *passing: type[GearfallError]
    ) -> None:
        """Append the current epoch; until the loop shows `until_s`, retry after what passes."""
        loop = asyncio.get_running_loop()
        pause_s = _RETRY_FIRST_S
        while self._is_waiting(running):
            try:
                entry_id = await self._queue.append(job_now(running))
            except passing as error:
                left_s = until_s - loop.time()
                if left_s <= 0:
                    raise gave_up(error, is_deadline=running.deadline_s <= loop.time()) from error
                await asyncio.sleep(min(pause_s, left_s))
                pause_s = min(pause_s * 2, _RETRY_MOST_S)
                self._reissue(running)
                continue
            if self._jobs.get(running.job.job_id) is running:
                running.entry_id = entry_id
            else:
                self._background.spawn(self._cancel(running.job.model, entry_id), "cancel-entry")
            return

    def _reissue(self, running: RunningJob) -> None:
        """An append whose answer was lost may have happened: fence its entry."""
        if self._is_waiting(running):
            record(history.Lost, running.job.job_id, running.log.reissue())

    def _is_waiting(self, running: RunningJob) -> bool:
        return (
            self._jobs.get(running.job.job_id) is running and running.log.state is LogState.WAITING
        )

    async def _check_entry(self, running: RunningJob) -> bool:
        """Append a waiting job again if its entry is gone or a worker without a stream has it."""
        entry_id, model = running.entry_id, running.job.model
        if entry_id is None or not self._is_waiting(running):
            return False
        holder = await self._queue.holder(model, entry_id)
        if holder is None and await self._queue.contains(model, entry_id):
            return False
        if not self._is_waiting(running) or running.entry_id != entry_id:
            return False
        if holder is not None and holder in self._links:
            return False
        where = f"held by {holder}, which is not connected" if holder else "gone"
        _log.warning(
            "a waiting entry is lost", extra={"job_id": running.job.job_id, "reason": where}
        )
        running.entry_id = None
        record(history.Lost, running.job.job_id, running.log.reissue())
        self._background.spawn(self._append_again(running), "append-again")
        return True

    async def _cancel(self, model: ModelName, entry_id: str) -> None:
        try:
            await self._queue.cancel(model, entry_id)
        except Unavailable as error:
            # Harmless: whoever claims the entry is told to stop.
            _log.info("could not cancel an entry", extra={"model": model, "error": error.message})

    def _fail(self, running: RunningJob, error: GearfallError) -> None:
        if self._jobs.get(running.job.job_id) is running:
            self.close(running.job.job_id, error.message)
            running.listener.on_failed(error)

    def _remove(self, running: RunningJob, reason: str) -> None:
        if self._jobs.pop(running.job.job_id, None) is not None:
            record(history.Ended, running.job.job_id, reason)
            if self._load is not None:
                self._load.ended(running.job.model)
        self._unlink(running)
        self._set_waiting(running, waits=False)
        running.log.close()

    def _unlink(self, running: RunningJob) -> None:
        if running.link is not None:
            running.link.jobs.discard(running.job.job_id)
            running.link = None

    def _set_waiting(self, running: RunningJob, *, waits: bool) -> None:
        job = running.job
        waiting = self._waiting.setdefault(job.model, WaitingJobs())
        if waits:
            changed = waiting.add(job, len(running.log.token_ids), time.time())
        else:
            changed = waiting.discard(job.job_id)
        if not waiting:
            del self._waiting[job.model]
        if changed:
            self._waiting_room.set_waiting(job.model, waiting.backlog())
