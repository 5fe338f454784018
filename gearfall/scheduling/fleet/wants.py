"""What a model wants of the fleet: whether it may take room from others, and where it may go."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from gearfall.core.ids import NodeId
from gearfall.core.memory import PROCESS_OVERHEAD_BYTES, estimate_replica_memory
from gearfall.core.records import DeploymentRecord, ModelRecord, WorkerRecord


class Urgency(IntEnum):
    """On whose account a replica is wanted, least urgent first."""

    BATCH = 0
    """Batch jobs wait, and no others: free room only."""
    KEEP = 1
    """Nobody waits: free room only."""
    GEAR = 2
    """The gear in force needs it there: free room, or that of idle replicas."""
    EVACUATE = 3
    """Jobs run on a worker that is leaving: free room, or that of idle replicas."""
    INTERACTIVE = 4
    """Somebody waits for the first token."""


@dataclass(frozen=True, slots=True)
class PlacementRules:
    """Where a model's replicas may go, from all deployments that name it."""

    labels: tuple[tuple[str, str], ...] = ()
    """That a worker must have, sorted; two values for one label match no worker."""
    spread: bool = False
    accelerators: int = 1

    def allow(self, worker: WorkerRecord) -> bool:
        """Whether the worker's labels match."""
        return all(worker.labels.get(name) == value for name, value in self.labels)


@dataclass(frozen=True, slots=True)
class Want:
    """One more replica of a model."""

    model: ModelRecord
    urgency: Urgency
    since_unix_s: float
    """When the oldest waiting job began to wait; when it was first wanted, where none waits."""
    jobs: int = 1
    """That wait for it."""
    rules: PlacementRules = field(default_factory=PlacementRules)
    node_id: NodeId | None = None
    """The only node where it is wanted; None: wherever it starts soonest."""
    wished: frozenset[NodeId] = frozenset()
    """Nodes where a gear plan would like to have it, whoever waits; none: all are alike."""
    reason: str = ""
    """Who wants it, where nobody waits."""
    moves_others: bool = True
    """Whether running jobs may be moved for it."""
    may_queue: bool = False
    """Whether it is pointless where the model's own replicas serve what waits sooner."""


def rules_of(deployments: Iterable[DeploymentRecord]) -> PlacementRules:
    """Return what all of a model's deployments ask for together."""
    deployments = tuple(deployments)
    labels = {item for each in deployments for item in each.labels.items()}
    return PlacementRules(
        tuple(sorted(labels)),
        any(each.spread for each in deployments),
        max((each.accelerators for each in deployments), default=1),
    )


def replica_bytes(model: ModelRecord, slots: int, accelerators: int = 1) -> int:
    """Return what a replica reserves on each of the workers that it runs on."""
    memory = estimate_replica_memory(model, slots)
    if accelerators == 1:
        return memory.total_bytes
    shared_bytes = memory.weights_bytes + memory.kv_bytes
    return -(-shared_bytes // accelerators) + PROCESS_OVERHEAD_BYTES
