"""Workers in simulated time: they follow assignments, start replicas, run jobs and move them."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import AssignmentRecord, ReplicaState
from gearfall.simulation.agenda import Agenda
from gearfall.simulation.batch_engine import BatchEngine
from gearfall.simulation.fleet.node import LoadTimes, SimNode
from gearfall.simulation.fleet.replica import SimReplica, timeline_of
from gearfall.simulation.fleet.router import SimRouter
from gearfall.simulation.requests import Job
from gearfall.simulation.site import Emptying, ModelProfile, Site, Timing, WorkerProfile

ReplicaKey = tuple[WorkerId, ModelName]
MOVES_AT_ONCE = 4
"""Jobs of one replica that move at the same time, as services/worker does it."""


class Publisher(Protocol):
    """Where replicas' records go."""

    def put_replica(self, replica: SimReplica) -> None:
        """It is now so."""
        ...

    def remove_replica(self, key: ReplicaKey) -> None:
        """It is gone."""
        ...


class SimWorkers:
    """Owner of all replicas."""

    def __init__(
        self,
        site: Site,
        nodes: dict[NodeId, SimNode],
        agenda: Agenda,
        *,
        router: SimRouter,
        publisher: Publisher,
        on_finished: Callable[[Job], None],
    ) -> None:
        """`on_finished` is called with a job that is over."""
        self._workers: dict[WorkerId, WorkerProfile] = {
            each.record.worker_id: each for each in site.workers
        }
        self._models: dict[ModelName, ModelProfile] = {
            each.record.name: each for each in site.models
        }
        self._timing: Timing = site.timing
        self._emptying = site.emptying
        self._nodes = nodes
        self._agenda = agenda
        self._router = router
        self._publisher = publisher
        self._on_finished = on_finished
        self._starts = 0
        self._draining: dict[ModelName, dict[WorkerId, SimReplica]] = {}
        self.replicas: dict[ReplicaKey, SimReplica] = {}
        self.device_bytes = 0
        """Copied to devices."""

    def follow(self, assignment: AssignmentRecord) -> None:
        """Start what is assigned, unless it is there."""
        key = (assignment.worker_id, assignment.model)
        if key in self.replicas:
            return
        replica = self._new(assignment)
        self.replicas[key] = replica
        self._publisher.put_replica(replica)
        taken_s = self._agenda.now_s
        on_loaded = partial(self._loaded, replica, taken_s)
        replica.on_loaded = on_loaded
        replica.node.take(assignment.model, on_loaded)

    def stand(self, assignment: AssignmentRecord) -> None:
        """Have a replica ready from the beginning."""
        replica = self._new(assignment)
        self.replicas[replica.key] = replica
        replica.state = ReplicaState.READY
        replica.idle_since_s = self._agenda.now_s
        self._publisher.put_replica(replica)
        self._router.open(replica)

    def take_back(self, key: ReplicaKey) -> None:
        """Empty a replica whose assignment is gone."""
        replica = self.replicas.get(key)
        if replica is None or replica.state is ReplicaState.DRAINING:
            return
        was_ready = replica.is_ready
        replica.state = ReplicaState.DRAINING
        self._draining.setdefault(key[1], {})[key[0]] = replica
        self._router.close(replica)
        if not was_ready and replica.on_loaded is not None:
            replica.node.drop(replica.assignment.model, replica.on_loaded)
        if self._emptying is Emptying.PREEMPT:
            self._preempt(replica)
        self._publisher.put_replica(replica)
        self._empty(replica)

    def check(self) -> None:
        """Invariant: slots, memory and number of replicas of each worker."""
        used: dict[WorkerId, int] = {}
        hosted: dict[WorkerId, int] = {}
        for (worker_id, _), replica in self.replicas.items():
            replica.check()
            used[worker_id] = used.get(worker_id, 0) + replica.assignment.memory_bytes
            hosted[worker_id] = hosted.get(worker_id, 0) + 1
        for worker_id, used_bytes in used.items():
            record = self._workers[worker_id].record
            assert used_bytes <= record.memory_bytes, f"{worker_id}: memory overflows"
            assert hosted[worker_id] <= record.max_replicas, f"{worker_id}: too many replicas"

    def _new(self, assignment: AssignmentRecord) -> SimReplica:
        worker, profile = self._workers[assignment.worker_id], self._models[assignment.model]
        self._starts += 1
        replica = SimReplica(
            assignment,
            worker,
            self._nodes[worker.record.node_id],
            profile,
            BatchEngine(profile.speed, self._agenda, lambda job: self._finished(replica, job)),
            accept=lambda job: self._accept(replica, job),
            number=self._starts,
        )
        return replica

    def _loaded(self, replica: SimReplica, taken_s: float, times: LoadTimes) -> None:
        replica.on_loaded = None
        replica.holds_bytes = True
        if replica.state is ReplicaState.DRAINING:
            self._empty(replica)
            return
        replica.state = ReplicaState.STARTING
        self._publisher.put_replica(replica)
        speed, size = replica.profile.speed, replica.profile.record.size_bytes
        device_s = size / speed.device_bytes_per_s if speed.device_bytes_per_s else 0.0
        self.device_bytes += size if device_s else 0
        self._agenda.after(device_s + speed.start_s, partial(self._ready, replica, taken_s, times))

    def _ready(self, replica: SimReplica, taken_s: float, times: LoadTimes) -> None:
        if replica.state is not ReplicaState.STARTING:
            return
        now_s = self._agenda.now_s
        replica.timeline = timeline_of(replica, times, taken_s, now_s)
        replica.state = ReplicaState.READY
        replica.idle_since_s = now_s
        self._router.open(replica)
        self._publisher.put_replica(replica)
        self._retry_moves(replica.assignment.model)

    def _accept(self, replica: SimReplica, job: Job) -> None:
        replica.jobs[job.job_id] = job
        replica.idle_since_s = 0.0
        replica.engine.begin(job)
        self._publisher.put_replica(replica)

    def _finished(self, replica: SimReplica, job: Job) -> None:
        del replica.jobs[job.job_id]
        replica.leaving.discard(job.job_id)
        job.finished_s = self._agenda.now_s
        self._on_finished(job)
        self._has_room(replica)

    def _has_room(self, replica: SimReplica) -> None:
        """A slot is free again: for one that waits, or for a job that has to move."""
        if replica.is_ready:
            model = replica.assignment.model
            self._router.room(model)
            if not replica.jobs and not replica.incoming:
                replica.idle_since_s = replica.idle_since_s or self._agenda.now_s
            self._publisher.put_replica(replica)
            self._retry_moves(model)
        else:
            self._publisher.put_replica(replica)
            self._empty(replica)

    def _empty(self, replica: SimReplica) -> None:
        """Bring a draining replica nearer to its end."""
        if self._emptying is Emptying.MOVE:
            self._move_jobs(replica)
        if replica.jobs or replica.incoming or replica.is_ending:
            return
        replica.is_ending = True
        self._agenda.after(self._timing.exit_s, partial(self._gone, replica))

    def _gone(self, replica: SimReplica) -> None:
        assert self.replicas.pop(replica.key) is replica
        worker_id, model = replica.key
        del self._draining[model][worker_id]
        if replica.holds_bytes:
            replica.node.give_back(model)
        self._publisher.remove_replica(replica.key)

    def _preempt(self, replica: SimReplica) -> None:
        for job in list(replica.jobs.values()):
            replica.engine.remove(job)
            del replica.jobs[job.job_id]
            job.preemptions += 1
            self._router.put_back(job)

    def _retry_moves(self, model: ModelName) -> None:
        """Jobs of replicas that are being emptied may have somewhere to go now."""
        for replica in tuple(self._draining.get(model, {}).values()):
            self._move_jobs(replica)

    def _move_jobs(self, source: SimReplica) -> None:
        """Longest first, as a drain of services/worker does: they would cost most to compute."""
        order = sorted(source.jobs.values(), key=lambda job: (-job.context_tokens, job.job_id))
        for job in order:
            if job.job_id in source.leaving or job.done_tokens < 1.0:
                continue
            if len(source.leaving) >= MOVES_AT_ONCE:
                return
            ready = self._router.ready(source.assignment.model)
            target = max(ready, key=lambda r: (r.free_slots, r.assignment.worker_id), default=None)
            if target is None or target.free_slots <= 0:
                return
            self._begin_move(source, target, job)

    def _begin_move(self, source: SimReplica, target: SimReplica, job: Job) -> None:
        source.leaving.add(job.job_id)
        target.incoming.add(job.job_id)
        target.idle_since_s = 0.0
        self._publisher.put_replica(target)
        compute = partial(self._compute_at_target, source, target, job)
        self._agenda.after(self._timing.move_fixed_s, compute)

    def _compute_at_target(self, source: SimReplica, target: SimReplica, job: Job) -> None:
        if job.job_id not in source.leaving:
            self._end_move(target, job)
            return
        hand_over = partial(self._hand_over, source, target, job)
        target.engine.prefill(job, job.context_tokens, hand_over)

    def _hand_over(self, source: SimReplica, target: SimReplica, job: Job) -> None:
        """The source stops at a token, the target goes on a moment later."""
        if job.job_id not in source.leaving:
            self._end_move(target, job)
            return
        source.engine.remove(job)
        source.leaving.discard(job.job_id)
        del source.jobs[job.job_id]
        job.moves += 1
        job.paused_s += self._timing.pause_s
        self._agenda.after(self._timing.pause_s, partial(self._go_on, target, job))
        self._has_room(source)

    def _go_on(self, target: SimReplica, job: Job) -> None:
        target.incoming.discard(job.job_id)
        target.jobs[job.job_id] = job
        target.engine.seat(job)
        self._publisher.put_replica(target)

    def _end_move(self, target: SimReplica, job: Job) -> None:
        """The job ended at its source before it came here."""
        target.incoming.discard(job.job_id)
        self._has_room(target)
