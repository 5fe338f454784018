"""A small pure world that carries plans out: workers start, serve, drain and move jobs.

One tick is one second. Nothing here decides: it does what assignments say and what the worker's
code promises, and holds every plan against what may never happen.
"""

from collections import Counter
from dataclasses import dataclass, replace

from gearfall.core.generation.job import Priority
from gearfall.core.ids import JobId, ModelName, RouterId, WorkerId
from gearfall.core.records import (
    AssignmentRecord,
    DemandRecord,
    ReplicaRecord,
    ReplicaState,
    RunningJob,
)
from gearfall.core.start_timeline import StartTimeline
from gearfall.scheduling.actions import Assign, BeginMove, Decide, EndMove, Unassign, Undecide
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.placement.moves import MOST_S
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.snapshot import ReplicaKey, rooms_of

START_S = 2.0
STEP_S = 0.1
DRAIN_S = 30.0
ROUTER = RouterId("r")
POLICY = SchedulerPolicy(
    keep_alive_s=20.0,
    min_residency_s=2.0,
    residency_per_start=2.0,
    patience_s=10.0,
    starvation_s=25.0,
)


@dataclass(slots=True)
class WorldJob:
    """One request on its way."""

    job_id: JobId
    model: ModelName
    tokens_left: float
    priority: Priority
    since_s: float
    key: ReplicaKey | None = None
    tokens_done: float = 0.0


class SmallWorld:
    """Owner of what really is; the fleet only hears of it by records."""

    def __init__(self, *records, policy=POLICY, slots=2):
        self.now = 1000.0
        self.policy = policy
        self.slots = slots
        self.fleet = Fleet()
        self.jobs: list[WorldJob] = []
        self.done = 0
        self.starts: Counter[ModelName] = Counter()
        self.took_back: dict[ReplicaKey, str] = {}
        """Assignments of this tick that were, with the reason."""
        self._began: dict[ReplicaKey, float] = {}
        self._drains: dict[ReplicaKey, float] = {}
        for kind, record in records:
            self.fleet.put(kind, record)

    @property
    def records(self):
        return self.fleet.records

    def ask(self, model, tokens, priority=Priority.INTERACTIVE):
        name = JobId(f"j{self.done + len(self.jobs)}")
        self.jobs.append(WorldJob(name, ModelName(model), tokens, priority, self.now))

    def lose_worker(self, worker_id):
        """It vanishes with all that runs there; routers put its jobs back."""
        self.fleet.remove("workers", worker_id)
        for key in [key for key in self.records.replicas if key[0] == worker_id]:
            self._drop_replica(key)

    def drain_worker(self, worker_id):
        """It takes nothing more; its jobs go on elsewhere."""
        if worker_id in self.records.workers:
            self.fleet.put("workers", replace(self.records.workers[worker_id], max_replicas=0))

    def tick(self):
        self.now += 1.0
        self.took_back.clear()
        self._run_jobs()
        self._follow_assignments()
        self._claim()
        self._publish()
        for _ in range(8):
            if not self._decide():
                break
        else:
            raise AssertionError("decides for ever though nothing changes")

    def _decide(self):
        plan = decide(self.fleet, StartCosts(), self.policy, self.now)
        assert plan.next_due_unix_s is None or plan.next_due_unix_s > self.now
        for action in plan.actions:
            self._apply(action)
        self.fleet.check()
        self.check()
        return any(not isinstance(action, Decide) for action in plan.actions)

    def _apply(self, action):
        match action:
            case Assign(assignment):
                key = (assignment.worker_id, assignment.model)
                assert key not in self.records.assignments, "one place given twice"
                assert key not in self.records.replicas, "its last replica is still there"
                self.starts[assignment.model] += 1
                self.fleet.put("assignments", assignment)
            case Unassign(key, reason):
                assert key in self.records.assignments, "took back what is not there"
                self._check_residency(key, reason)
                self.took_back[key] = reason
                self.fleet.remove("assignments", key)
            case BeginMove(move):
                assert (move.worker_id, move.model) not in self.records.moves
                self.fleet.put("moves", move)
            case EndMove(key, _):
                assert key in self.records.moves
                self.fleet.remove("moves", key)
            case Decide(decision):
                assert len(decision.rejected) <= 16
                self.fleet.put("decisions", decision)
            case Undecide(model):
                assert model not in self.records.models
                self.fleet.remove("decisions", model)

    def _check_residency(self, key, reason):
        assignment = self.records.assignments[key]
        key = (assignment.group[0], key[1]) if assignment.group else key
        replica = self.records.replicas.get(key)
        is_batch = all(job.priority is Priority.BATCH for job in self.jobs if job.key == key)
        if "makes room" not in reason or (is_batch and replica and replica.jobs):
            return
        if replica is None or replica.state is not ReplicaState.READY:
            waits = [job.priority for job in self.jobs if job.model == key[1] and not job.key]
            assert Priority.INTERACTIVE not in waits, "a start was given up that somebody waits for"
            return
        stayed_s = self.now - assignment.assigned_unix_s - START_S
        least_s = max(self.policy.min_residency_s, self.policy.residency_per_start * START_S)
        assert stayed_s >= least_s, f"stayed {stayed_s} of {least_s} s"

    def check(self):
        """No slot is given twice, no capacity exceeded, no move goes on for ever."""
        for room in rooms_of(self.records.as_snapshot()).values():
            assert room.used_bytes <= max(room.worker.memory_bytes, 0) or not room.hosting
            assert len(room.hosting) <= room.worker.max_replicas or not room.worker.max_replicas
        for move in self.records.moves.values():
            assert self.now <= move.began_unix_s + MOST_S + 1.0
        for assignment in self.records.assignments.values():
            for worker_id in assignment.group:
                assert (worker_id, assignment.model) in self.records.assignments, "half a group"

    def _run_jobs(self):
        for job in tuple(self.jobs):
            if job.key is not None:
                job.tokens_left -= 1.0 / STEP_S
                job.tokens_done += 1.0 / STEP_S
                if job.tokens_left <= 0:
                    self.jobs.remove(job)
                    self.done += 1

    def _follow_assignments(self):
        for key, assignment in self.records.assignments.items():
            if (
                key[0] in self.records.workers
                and key not in self._began
                and not follows(assignment)
            ):
                self._began[key] = self.now
        for key in tuple(self._began):
            if key not in self.records.assignments or key[0] not in self.records.workers:
                self._drain(key)

    def _drain(self, key):
        """Move jobs to where the model is ready; hand back what did not end in time."""
        since = self._drains.setdefault(key, self.now)
        for job in [each for each in self.jobs if each.key == key]:
            job.key = self._place_for(job.model, besides=key)
            if job.key is None and self.now - since < DRAIN_S:
                job.key = key
        if not any(job.key == key for job in self.jobs):
            self._drop_replica(key)

    def _drop_replica(self, key):
        for job in self.jobs:
            job.key = None if job.key == key else job.key
        self._began.pop(key, None)
        self._drains.pop(key, None)
        self.fleet.remove("replicas", key)

    def _is_ready(self, key):
        is_up = key in self._began and self.now - self._began[key] >= START_S
        return is_up and key not in self._drains and key in self.records.assignments

    def _place_for(self, model, besides=None):
        for key in self._began:
            running = sum(job.key == key for job in self.jobs)
            if key[1] == model and key != besides and self._is_ready(key) and running < self.slots:
                return key
        return None

    def _claim(self):
        for job in self.jobs:
            if job.key is None:
                job.key = self._place_for(job.model)

    def _publish(self):
        for key in self._began:
            self.fleet.put("replicas", self._replica(key))
        for name in self.records.models:
            waits = [job for job in self.jobs if job.model == name and job.key is None]
            if not waits:
                self.fleet.remove("demand", (name, ROUTER))
                continue
            self.fleet.put(
                "demand",
                DemandRecord(
                    name,
                    ROUTER,
                    len(waits),
                    min(job.since_s for job in waits),
                    batch_jobs=sum(job.priority is Priority.BATCH for job in waits),
                ),
            )

    def _replica(self, key):
        state = ReplicaState.READY if self._is_ready(key) else ReplicaState.LOADING
        if key in self._drains:
            state = ReplicaState.DRAINING
        jobs = tuple(
            RunningJob(
                job.job_id,
                10,
                int(job.tokens_done),
                int(job.tokens_done + max(0, job.tokens_left)),
                job.priority,
            )
            for job in self.jobs
            if job.key == key
        )
        known = self.records.replicas.get(key)
        idle_since = known.idle_since_unix_s if known and known.idle_since_unix_s else self.now
        assignment = self.records.assignments.get(key)
        return ReplicaRecord(
            worker_id=key[0],
            node_id=self._node_of(key[0]),
            model=key[1],
            state=state,
            slots=self.slots,
            running_jobs=len(jobs),
            pid=1,
            memory_bytes=assignment.memory_bytes if assignment else known.memory_bytes,
            idle_since_unix_s=0.0 if jobs else idle_since,
            timeline=StartTimeline(total_s=START_S if state is ReplicaState.READY else 0.0),
            jobs=jobs,
            seen_unix_s=self.now,
            step_s=STEP_S,
        )

    def _node_of(self, worker_id: WorkerId):
        worker = self.records.workers.get(worker_id)
        return worker.node_id if worker else "gone"


def follows(assignment: AssignmentRecord) -> bool:
    """Whether another worker of its group runs the engine."""
    return bool(assignment.group) and assignment.group[0] != assignment.worker_id
