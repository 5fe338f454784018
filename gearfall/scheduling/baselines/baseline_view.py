"""What the simple policies see of a cluster, and what they have decided about it so far."""

from dataclasses import dataclass, field

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.scaling.autoscaler_limits import ModelLimits, limits_by_model
from gearfall.scheduling.snapshot import (
    ClusterSnapshot,
    Hosted,
    ReplicaKey,
    Waiting,
    WorkerRoom,
    reserved_bytes,
    rooms_of,
    waiting_by_model,
)


@dataclass(slots=True)
class View:
    """Owner of each worker's room and of who is hosted where."""

    snapshot: ClusterSnapshot
    policy: SchedulerPolicy
    rooms: dict[WorkerId, WorkerRoom] = field(init=False)
    hosted: dict[ModelName, dict[ReplicaKey, Hosted]] = field(init=False)
    waiting: dict[ModelName, Waiting] = field(init=False)
    limits: dict[ModelName, ModelLimits] = field(init=False)
    jobs_on: dict[NodeId, int] = field(init=False)

    def __post_init__(self) -> None:
        snapshot = self.snapshot
        self.rooms = rooms_of(snapshot)
        self.waiting = waiting_by_model(snapshot.demand)
        self.limits = limits_by_model(snapshot.models, snapshot.deployments, self.policy)
        self.hosted = {}
        self.jobs_on = {}
        for key, assignment in snapshot.assignments.items():
            hosted = Hosted(assignment, snapshot.replicas.get(key))
            self.hosted.setdefault(key[1], {})[key] = hosted
        for replica in snapshot.replicas.values():
            running = self.jobs_on.get(replica.node_id, 0)
            self.jobs_on[replica.node_id] = running + replica.running_jobs

    def models_in_order(self) -> list[ModelName]:
        """Models that anything is to be decided about, longest waiting first."""
        models = self.waiting.keys() | self.hosted.keys()
        models |= {name for name, each in self.limits.items() if each.min_replicas}

        def order(model: ModelName) -> tuple[float, ModelName]:
            waiting = self.waiting.get(model)
            return (waiting.since_unix_s if waiting else float("inf"), model)

        return sorted(models & self.snapshot.models.keys(), key=order)

    def counted(self, model: ModelName) -> tuple[Hosted, ...]:
        """Return a model's replicas that are in reach and not failing."""
        hosted = self.hosted.get(model, {})
        return tuple(
            each
            for _, each in sorted(hosted.items())
            if (room := self.rooms.get(each.key[0])) and room.is_reachable and not each.is_failing
        )

    def on(self, worker_id: WorkerId) -> list[tuple[ReplicaKey, Hosted]]:
        """Return the assigned replicas of a worker."""
        keys = [(worker_id, model) for model in self.rooms[worker_id].hosting]
        return [(key, each) for key in keys if (each := self.hosted.get(key[1], {}).get(key))]

    def took(self, worker_id: WorkerId, model: ModelName, memory_bytes: int) -> None:
        """A replica was assigned."""
        self.rooms[worker_id] = self.rooms[worker_id].with_replica(model, memory_bytes)

    def gave_back(self, key: ReplicaKey) -> None:
        """A replica was told to go."""
        worker_id, model = key
        self.hosted.get(model, {}).pop(key, None)
        if worker_id in self.rooms:
            size = reserved_bytes(self.snapshot, key)
            self.rooms[worker_id] = self.rooms[worker_id].with_leaving(model, size)
