"""What a decision step asks its caller to write, in order; every write is fenced."""

from dataclasses import dataclass

from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import AssignmentRecord, DecisionRecord, MoveRecord, PrefetchRecord
from gearfall.scheduling.snapshot import ReplicaKey


@dataclass(frozen=True, slots=True)
class Assign:
    """Write this assignment."""

    assignment: AssignmentRecord


@dataclass(frozen=True, slots=True)
class Unassign:
    """Delete the assignment of (worker, model)."""

    key: ReplicaKey
    reason: str


@dataclass(frozen=True, slots=True)
class BeginMove:
    """Write this move down, before the assignment that is its first step."""

    move: MoveRecord


@dataclass(frozen=True, slots=True)
class EndMove:
    """Delete the move of (worker, model): done or given up."""

    key: ReplicaKey
    reason: str


@dataclass(frozen=True, slots=True)
class Wish:
    """Write this wish for a prefetch."""

    prefetch: PrefetchRecord


@dataclass(frozen=True, slots=True)
class Unwish:
    """Delete the wish of (node, model)."""

    key: tuple[NodeId, ModelName]
    reason: str


@dataclass(frozen=True, slots=True)
class Decide:
    """Write down why."""

    decision: DecisionRecord


@dataclass(frozen=True, slots=True)
class Undecide:
    """Delete what was written down about a model that is registered no more."""

    model: ModelName


Action = Assign | Unassign | BeginMove | EndMove | Wish | Unwish | Decide | Undecide
