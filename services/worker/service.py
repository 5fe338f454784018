"""What a worker answers about itself and is told to do."""

from dataclasses import dataclass

from gearfall.core.errors import InvalidRequest
from gearfall.core.records import ReplicaRecord, WorkerRecord
from services.worker.host import DrainReport, WorkerHost

LONGEST_DRAIN_S = 3600.0


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker and what it hosts."""

    record: WorkerRecord
    replicas: tuple[ReplicaRecord, ...]

    @property
    def memory_used_bytes(self) -> int:
        """Reserved by all replicas."""
        return sum(replica.memory_bytes for replica in self.replicas)


class WorkerService:
    """Status and drain of one worker."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    def status(self) -> WorkerState:
        """Return what is hosted now."""
        return WorkerState(self._host.record, self._host.replicas())

    async def drain(self, deadline_s: float) -> DrainReport:
        """Stop claiming and end all replicas within `deadline_s`. Raises InvalidRequest."""
        if not 0.0 <= deadline_s <= LONGEST_DRAIN_S:
            raise InvalidRequest(
                f"deadline_s must be between 0 and {LONGEST_DRAIN_S:g}, not {deadline_s}",
                param="deadline_s",
            )
        return await self._host.drain(deadline_s)
