"""The records that decisions are made from, one table a kind, named as in cluster state."""

from collections.abc import Mapping
from typing import Any

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
    WorkerRecord,
)
from gearfall.scheduling.snapshot import ClusterSnapshot, ReplicaKey

ID_FIELDS: Mapping[str, tuple[str, ...]] = {
    "models": ("name",),
    "deployments": ("name",),
    "nodes": ("node_id",),
    "workers": ("worker_id",),
    "assignments": ("worker_id", "model"),
    "replicas": ("worker_id", "model"),
    "demand": ("model", "router_id"),
    "load": ("model", "router_id"),
    "moves": ("worker_id", "model"),
    "prefetch": ("node_id", "model"),
    "gear_plans": ("name",),
    "gear_votes": ("name", "router_id"),
    "decisions": ("model",),
}


class FleetRecords:
    """Owner of the tables."""

    def __init__(self) -> None:
        self.models: dict[ModelName, ModelRecord] = {}
        """All that are registered, adapters and those that are being removed among them."""
        self.deployments: dict[DeploymentName, DeploymentRecord] = {}
        self.nodes: dict[NodeId, NodeRecord] = {}
        self.workers: dict[WorkerId, WorkerRecord] = {}
        self.assignments: dict[ReplicaKey, AssignmentRecord] = {}
        self.replicas: dict[ReplicaKey, ReplicaRecord] = {}
        self.demand: dict[tuple[ModelName, RouterId], DemandRecord] = {}
        self.load: dict[tuple[ModelName, RouterId], LoadRecord] = {}
        self.moves: dict[ReplicaKey, MoveRecord] = {}
        self.prefetch: dict[tuple[NodeId, ModelName], PrefetchRecord] = {}
        self.gear_plans: dict[DeploymentName, GearPlanRecord] = {}
        self.gear_votes: dict[tuple[DeploymentName, RouterId], GearVoteRecord] = {}
        self.decisions: dict[ModelName, DecisionRecord] = {}
        self.unreachable: frozenset[WorkerId] = frozenset()
        self.awaited: dict[WorkerId, float] = {}

    def table(self, kind: str) -> dict[Any, Any]:
        """Return the records of a kind by what names them."""
        found: dict[Any, Any] = getattr(self, kind)
        return found

    def reserved_bytes(self, key: ReplicaKey) -> int:
        """Return what (worker, model) holds or has reserved."""
        assignment, replica = self.assignments.get(key), self.replicas.get(key)
        assigned = assignment.memory_bytes if assignment else 0
        return max(assigned, replica.memory_bytes if replica else 0)

    def as_snapshot(self) -> ClusterSnapshot:
        """Return all records as they are now."""
        tables = {kind: dict(self.table(kind)) for kind in ID_FIELDS if kind != "demand"}
        return ClusterSnapshot(
            **tables,
            demand=tuple(self.demand.values()),
            unreachable=self.unreachable,
            awaited=dict(self.awaited),
        )


def id_of(kind: str, record: Any) -> Any:
    """Return what names a record: a string, or a pair for kinds with two id fields."""
    ids = tuple(getattr(record, field) for field in ID_FIELDS[kind])
    return ids if len(ids) > 1 else ids[0]
