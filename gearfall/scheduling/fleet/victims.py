"""Which replicas may have to make room for another model, and from when.

In this order: those that do batch work only, at once; those that idle, after their minimum
residency; those that run jobs, which are moved alive, or go when the other has waited out its
patience; those that must be kept somewhere, which may move and not go; those whose own jobs wait as
well, when the other would starve; those that are still starting, which others may only wait for.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from gearfall.core.generation.job import Priority
from gearfall.core.records import ReplicaRecord, ReplicaState
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy, evictable_at
from gearfall.scheduling.snapshot import Hosted, ReplicaKey, Waiting

_ALWAYS, _NEVER = float("-inf"), float("inf")
_COMING = frozenset({ReplicaState.LOADING, ReplicaState.STARTING})


class VictimKind(IntEnum):
    """What a replica is to others that want its room, first to go first."""

    HARVEST = 0
    IDLE = 1
    BUSY = 2
    KEPT = 3
    CONTESTED = 4
    COMING = 5


@dataclass(frozen=True, slots=True)
class Victim:
    """A replica that may have to make room."""

    key: ReplicaKey
    kind: VictimKind
    memory_bytes: int
    rested_unix_s: float
    """It stays at least until then; infinite for one that is still starting."""
    idle_since_unix_s: float = 0.0
    """0 while it runs jobs."""

    @property
    def is_cheap(self) -> bool:
        """Whether it goes without anybody's jobs being moved or finished."""
        return self.kind in {VictimKind.HARVEST, VictimKind.IDLE}

    def goes_at(self, wanted_since_unix_s: float, policy: SchedulerPolicy) -> float:
        """Return from when it goes though it can't be moved; infinite for never."""
        grace_s = {
            VictimKind.KEPT: _NEVER,
            VictimKind.BUSY: policy.patience_s,
            VictimKind.CONTESTED: policy.starvation_s,
        }.get(self.kind)
        if grace_s is None:
            return self.rested_unix_s
        return max(self.rested_unix_s, wanted_since_unix_s + grace_s)


def victim_of(
    hosted: Hosted,
    waiting: Waiting | None,
    memory_bytes: int,
    *,
    spare: bool,
    policy: SchedulerPolicy,
) -> Victim | None:
    """Return a replica as a victim; None for one that stays, whoever wants its room.

    `waiting`: for its own model. `spare`: the model would keep its min_replicas.
    """
    if spare and _is_harvest(hosted.replica, waiting):
        return Victim(hosted.key, VictimKind.HARVEST, memory_bytes, 0.0)
    if spare and _is_coming(hosted):
        return Victim(hosted.key, VictimKind.COMING, memory_bytes, _NEVER)
    has_demand = waiting is not None
    rested = evictable_at(
        hosted, has_demand=has_demand, spare=True, wanted_since_unix_s=_ALWAYS, policy=policy
    )
    if rested is None or hosted.replica is None:
        return None
    if has_demand:
        return Victim(hosted.key, VictimKind.CONTESTED, memory_bytes, rested) if spare else None
    kind = VictimKind.IDLE if hosted.is_idle else VictimKind.BUSY
    idle_since_unix_s = hosted.replica.idle_since_unix_s
    kept = kind if spare else VictimKind.KEPT
    return Victim(hosted.key, kept, memory_bytes, rested, idle_since_unix_s)


def _is_coming(hosted: Hosted) -> bool:
    is_starting = hosted.replica is None or hosted.replica.state in _COMING
    return is_starting and not hosted.is_failing


def _is_harvest(replica: ReplicaRecord | None, waiting: Waiting | None) -> bool:
    """Whether only batch work keeps a replica, or brings it up."""
    if waiting is not None and waiting.batch_jobs < waiting.jobs:
        return False
    if replica is None:
        return waiting is not None
    if replica.state is not ReplicaState.READY:
        return waiting is not None and replica.state is not ReplicaState.DRAINING
    return bool(replica.jobs) and all(job.priority is Priority.BATCH for job in replica.jobs)


def first_to_go(victims: Iterable[Victim]) -> list[Victim]:
    """Return victims in the order in which they go: by kind, then least recently used."""
    return sorted(victims, key=lambda v: (v.kind, v.idle_since_unix_s, v.key))
