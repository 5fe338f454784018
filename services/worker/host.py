"""The worker host: registered, it follows its assignments, one replica per model."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from gearfall.core.errors import NotFound, Unavailable
from gearfall.core.ids import JobId, ModelName, WorkerId
from gearfall.core.records import AssignmentRecord, ModelRecord, ReplicaRecord, WorkerRecord
from gearfall.infra.state.cluster import Cluster
from services.worker.migration.evacuation import Departure
from services.worker.registration import Registration
from services.worker.replicas.draining import DrainOutcome
from services.worker.replicas.replica import Replica

UNASSIGNED_DRAIN_S = 30.0
"""How long jobs may finish on a replica whose assignment was taken back."""

MakeReplica = Callable[[AssignmentRecord, ModelRecord], Replica]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What became of the jobs that ran when the worker's drain began."""

    finished_jobs: int
    lost_job_ids: tuple[JobId, ...]
    departures: tuple[Departure, ...] = ()
    """Jobs that were offered to other workers."""

    @property
    def migrated_jobs(self) -> int:
        """Jobs that go on elsewhere without a pause."""
        return sum(1 for each in self.departures if each.moved)


class WorkerHost:
    """Owner of this worker's replicas."""

    def __init__(
        self, cluster: Cluster, registration: Registration, make_replica: MakeReplica
    ) -> None:
        self._cluster = cluster
        self._registration = registration
        self._make_replica = make_replica
        self._replicas: dict[ModelName, Replica] = {}
        self._drains: dict[ModelName, asyncio.Task[DrainOutcome]] = {}
        self._settling: set[asyncio.Task[None]] = set()
        """Of replicas that have left, while the queue may hold entries for them."""
        self._workers_seen: frozenset[WorkerId] = frozenset()
        self._losses_seen = 0
        self._adrift: set[ModelName] = set()
        """Hosted models whose assignment is gone, though nobody took it back."""
        self._is_draining = False
        self._task: asyncio.Task[None] | None = None
        self._record: WorkerRecord | None = None

    @property
    def record(self) -> WorkerRecord:
        """This worker as it is registered."""
        assert self._record is not None
        return self._record

    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """Return what is hosted, with the jobs that run now."""
        return tuple(
            replace(r.record, running_jobs=r.running_jobs) for r in self._replicas.values()
        )

    def digest_of(self, model: ModelName) -> str:
        """Return which checkpoint the model's replica serves. Raises NotFound when none does."""
        if model not in self._replicas:
            raise NotFound(f"{model} is not hosted here")
        return self._replicas[model].digest

    def find_obstacle(self, model: ModelName) -> str:
        """Return why the model takes no more jobs here; empty if it does."""
        replica = self._replicas.get(model)
        if replica is None or self._is_draining:
            return f"{model} is not hosted here" if replica is None else "the worker is leaving"
        return replica.find_obstacle()

    def note_moved(self, model: ModelName) -> None:
        """A migration from here has ended: its replica's record says what a move costs."""
        if model in self._replicas:
            self._replicas[model].note_moved()

    async def start(self, record: WorkerRecord) -> None:
        """Register and follow the assignments. Raises Unavailable without cluster state."""
        self._record = record
        await self._registration.start(record)
        self._task = asyncio.create_task(self._follow(), name="assignments")

    async def drain(self, deadline_s: float) -> DrainReport:
        """Take nothing more; move jobs or let them finish until `deadline_s` from now, hand the
        rest back."""
        if not self._is_draining:
            self._is_draining = True
            self._record = replace(self.record, max_replicas=0)
            with contextlib.suppress(Unavailable):
                await self._registration.update(self.record)
        for model in tuple(self._replicas):
            self._start_drain(model, deadline_s)
        outcomes = await asyncio.gather(*self._drains.values())
        return DrainReport(
            finished_jobs=sum(outcome.finished_jobs for outcome in outcomes),
            lost_job_ids=tuple(job_id for o in outcomes for job_id in o.lost_job_ids),
            departures=tuple(each for o in outcomes for each in o.departures),
        )

    async def stop(self, deadline_s: float) -> None:
        """Drain until `deadline_s` from now, then deregister. Idempotent."""
        if self._task is None:
            return
        await self.drain(deadline_s)
        tasks = {self._task, *self._settling}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._registration.stop()

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._cluster.changes()) as changes:
            async for kinds in changes:
                self._notice_loss()
                if kinds & {"assignments", "models"}:
                    self._reconcile()
                if "workers" in kinds:
                    self._notice_dead_workers()

    def _reconcile(self) -> None:
        """Start what is assigned and not there; drain what is there and not assigned."""
        view, own = self._cluster.view, self.record.worker_id
        wanted = {model: a for (worker, model), a in view.assignments.items() if worker == own}
        for model in tuple(self._replicas):
            if model not in wanted and model not in self._adrift:
                self._start_drain(model, UNASSIGNED_DRAIN_S, yields=True)
        for model in self._adrift & wanted.keys():
            self._adrift.discard(model)
            self._replicas[model].note_adrift(is_adrift=False)
        for model, assignment in wanted.items():
            registered = view.models.get(model)
            if registered is not None and model not in self._replicas and not self._is_draining:
                _log.info("starting replica", extra={"model": model, "reason": assignment.reason})
                self._replicas[model] = self._make_replica(assignment, registered)
                self._replicas[model].start()
        for replica in self._replicas.values():
            replica.note_models(view.models)

    def _notice_loss(self) -> None:
        """When cluster state lost its memory, serve on: nobody took an assignment back."""
        losses = self._cluster.view.losses
        if losses == self._losses_seen:
            return
        self._losses_seen = losses
        self._adrift = set(self._replicas) - set(self._drains)
        _log.warning("cluster state lost its memory", extra={"serving_on": sorted(self._adrift)})
        for model in self._adrift:
            self._replicas[model].note_adrift(is_adrift=True)
        self._registration.note_loss()

    def _start_drain(self, model: ModelName, deadline_s: float, *, yields: bool = False) -> None:
        """`yields`: somebody waits for the room: batch jobs go back at once."""
        if model not in self._drains:
            drain = self._drain_one(self._replicas[model], deadline_s, yields=yields)
            self._drains[model] = asyncio.create_task(drain, name=f"drain-{model}")

    async def _drain_one(
        self, replica: Replica, deadline_s: float, *, yields: bool
    ) -> DrainOutcome:
        outcome = await replica.drain(deadline_s, yields=yields)
        del self._replicas[replica.model], self._drains[replica.model]
        self._adrift.discard(replica.model)
        settling = asyncio.create_task(replica.settle(), name=f"settle-{replica.model}")
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        self._reconcile()
        return outcome

    def _notice_dead_workers(self) -> None:
        """When a worker left the view, take its claimed entries over."""
        workers = frozenset(self._cluster.view.workers)
        if self._workers_seen - workers:
            for replica in self._replicas.values():
                replica.request_reclaim()
        self._workers_seen = workers
