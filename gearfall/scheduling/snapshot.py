"""The frozen picture of the cluster that a decision is made from, and each worker's room in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gearfall.core.gears.gear_records import GearPlanRecord, GearVoteRecord
from gearfall.core.ids import DeploymentName, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.records import (
    AssignmentRecord,
    DecisionRecord,
    DemandRecord,
    DeploymentRecord,
    LoadRecord,
    ModelRecord,
    MoveRecord,
    NodeRecord,
    PrefetchRecord,
    ReplicaRecord,
    ReplicaState,
    WorkerRecord,
)

ReplicaKey = tuple[WorkerId, ModelName]

FAILURES_TO_MOVE = 2
"""Failed starts in a row after which a replica is tried elsewhere as well."""


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """Cluster state at one moment; the mappings are not changed after construction."""

    models: Mapping[ModelName, ModelRecord] = field(default_factory=dict)
    deployments: Mapping[DeploymentName, DeploymentRecord] = field(default_factory=dict)
    nodes: Mapping[NodeId, NodeRecord] = field(default_factory=dict)
    workers: Mapping[WorkerId, WorkerRecord] = field(default_factory=dict)
    assignments: Mapping[ReplicaKey, AssignmentRecord] = field(default_factory=dict)
    replicas: Mapping[ReplicaKey, ReplicaRecord] = field(default_factory=dict)
    demand: tuple[DemandRecord, ...] = ()
    decisions: Mapping[ModelName, DecisionRecord] = field(default_factory=dict)
    unreachable: frozenset[WorkerId] = frozenset()
    """Workers whose connection is broken though their lease still runs."""
    awaited: Mapping[WorkerId, float] = field(default_factory=dict)
    """Workers without a record that may yet register again, and until when (Unix seconds)."""
    moves: Mapping[ReplicaKey, MoveRecord] = field(default_factory=dict)
    """Under way, by the replica that leaves."""
    prefetch: Mapping[tuple[NodeId, ModelName], PrefetchRecord] = field(default_factory=dict)
    load: Mapping[tuple[ModelName, RouterId], LoadRecord] = field(default_factory=dict)
    gear_plans: Mapping[DeploymentName, GearPlanRecord] = field(default_factory=dict)
    gear_votes: Mapping[tuple[DeploymentName, RouterId], GearVoteRecord] = field(
        default_factory=dict
    )


_NOT_SERVING = frozenset({ReplicaState.FAILED, ReplicaState.LOADING, ReplicaState.STARTING})


@dataclass(frozen=True, slots=True)
class Hosted:
    """One assignment with the replica it led to, if there is one yet."""

    assignment: AssignmentRecord
    replica: ReplicaRecord | None

    @property
    def key(self) -> ReplicaKey:
        """(worker, model)."""
        return (self.assignment.worker_id, self.assignment.model)

    @property
    def is_ready(self) -> bool:
        """Whether it claims jobs."""
        return self.replica is not None and self.replica.state is ReplicaState.READY

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs on it and nothing is on its way up."""
        if self.replica is None:
            return False
        if self.replica.state is ReplicaState.FAILED:
            return True
        return self.is_ready and self.replica.idle_since_unix_s > 0.0

    @property
    def is_failing(self) -> bool:
        """Whether it does not come up here: its worker tries on, with pauses."""
        return (
            self.replica is not None
            and self.replica.failures >= FAILURES_TO_MOVE
            and self.replica.state in _NOT_SERVING
        )

    @property
    def start_s(self) -> float:
        """Seconds from the assignment to the ready replica, 0 while unknown."""
        return self.replica.timeline.total_s if self.replica else 0.0

    @property
    def return_s(self) -> float:
        """Seconds of a start from memory, where the bytes of one that leaves are for now."""
        if self.replica is None:
            return 0.0
        spent = self.replica.timeline
        elsewhere_s = spent.remote_s + spent.ssd_s + spent.waited_s + spent.prepare_s
        return max(0.0, spent.total_s - elsewhere_s)

    @property
    def come_back_s(self) -> float:
        """Seconds that its start would take again: without queue and first canary; 0 unknown."""
        if self.replica is None:
            return 0.0
        spent = self.replica.timeline
        once_s = spent.queued_s + spent.waited_s + spent.prepare_s
        return max(0.0, spent.total_s - once_s)

    @property
    def running_jobs(self) -> int:
        """Jobs that run on it."""
        return self.replica.running_jobs if self.replica else 0

    @property
    def free_slots(self) -> int:
        """Jobs that it could run beside those, once it is ready."""
        return max(0, self.replica.slots - self.running_jobs) if self.replica else 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """Jobs of one model that wait at any router."""

    jobs: int
    since_unix_s: float
    """When the oldest of them began to wait."""
    tokens: int = 0
    """To compute for all of them, prompts and answers, at most."""
    batch_jobs: int = 0
    """Of the jobs, those that take idle capacity only."""
    prompt_tokens: int = 0
    """Of the tokens, those of prompts."""

    @property
    def output_tokens(self) -> int:
        """Of the tokens, those of answers."""
        return self.tokens - self.prompt_tokens


def waiting_by_model(demand: tuple[DemandRecord, ...]) -> dict[ModelName, Waiting]:
    """Add up the demand of all routers; models nobody waits for are left out."""
    waiting: dict[ModelName, Waiting] = {}
    for record in demand:
        if record.waiting_jobs <= 0:
            continue
        known = waiting.get(record.model, Waiting(0, record.since_unix_s))
        waiting[record.model] = Waiting(
            known.jobs + record.waiting_jobs,
            min(known.since_unix_s, record.since_unix_s),
            known.tokens + record.prompt_tokens + record.output_tokens,
            known.batch_jobs + record.batch_jobs,
            known.prompt_tokens + record.prompt_tokens,
        )
    return waiting


@dataclass(frozen=True, slots=True)
class WorkerRoom:
    """What one worker has left. Anything assigned or still running there takes room."""

    worker: WorkerRecord
    used_bytes: int = 0
    leaving_bytes: int = 0
    """Of the used bytes, those of replicas that are on their way out."""
    hosting: frozenset[ModelName] = frozenset()
    leaving: frozenset[ModelName] = frozenset()
    """Of the hosted models, those that are on their way out."""
    is_reachable: bool = True

    def fits(self, memory_bytes: int, *, after_leaving: bool = False) -> bool:
        """Whether one more replica has room, now or once those that leave are gone."""
        used = self.used_bytes - (self.leaving_bytes if after_leaving else 0)
        hosted = len(self.hosting) - (len(self.leaving) if after_leaving else 0)
        return used + memory_bytes <= self.worker.memory_bytes and hosted < self.worker.max_replicas

    def with_replica(self, model: ModelName, memory_bytes: int) -> "WorkerRoom":
        """Return the room after one more replica was assigned."""
        return replace(
            self, used_bytes=self.used_bytes + memory_bytes, hosting=self.hosting | {model}
        )

    def with_leaving(self, model: ModelName, memory_bytes: int) -> "WorkerRoom":
        """Return the room after a hosted replica was told to go."""
        if model in self.leaving:
            return self
        return replace(
            self,
            leaving_bytes=self.leaving_bytes + memory_bytes,
            leaving=self.leaving | {model},
        )


def reserved_bytes(snapshot: ClusterSnapshot, key: ReplicaKey) -> int:
    """Return what (worker, model) holds or has reserved."""
    assignment, replica = snapshot.assignments.get(key), snapshot.replicas.get(key)
    return max(assignment.memory_bytes if assignment else 0, replica.memory_bytes if replica else 0)


def rooms_of(snapshot: ClusterSnapshot) -> dict[WorkerId, WorkerRoom]:
    """Return the room of every live worker."""
    rooms = {
        worker_id: WorkerRoom(
            worker,
            is_reachable=worker_id not in snapshot.unreachable,
        )
        for worker_id, worker in snapshot.workers.items()
    }
    for key in sorted(snapshot.assignments.keys() | snapshot.replicas.keys()):
        worker_id, model = key
        if worker_id not in rooms:
            continue
        size = reserved_bytes(snapshot, key)
        room = rooms[worker_id].with_replica(model, size)
        rooms[worker_id] = room if key in snapshot.assignments else room.with_leaving(model, size)
    return rooms


def placeable(models: Mapping[ModelName, ModelRecord]) -> dict[ModelName, ModelRecord]:
    """Return the models that may have replicas: LoRA adapters run on their bases' replicas."""
    return {name: each for name, each in models.items() if not each.is_removing and not each.base}


def on_bases(
    deployments: Mapping[DeploymentName, DeploymentRecord], models: Mapping[ModelName, ModelRecord]
) -> dict[DeploymentName, DeploymentRecord]:
    """Return deployments as far as replicas are concerned: an adapter's stage is its base's."""

    def host_of(model: ModelName) -> ModelName:
        record = models.get(model)
        return ModelName(record.base) if record is not None and record.base else model

    return {
        name: replace(
            each,
            stages=tuple(replace(stage, model=host_of(stage.model)) for stage in each.stages),
        )
        for name, each in deployments.items()
    }
