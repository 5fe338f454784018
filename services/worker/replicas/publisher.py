"""Writes replica records to cluster state: a change of state at once, idle and busy coalesced.

How full the memory for keys and values is goes out with them, and in between when it changed by a
step: routers shift gears by it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from gearfall.core.errors import Conflict, GearfallError
from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.ports import Lease
from gearfall.core.records import ReplicaRecord
from gearfall.infra.state.cluster import Cluster
from services.worker.replicas.workload import KV_INTERVAL_S, KV_STEP

COALESCE_S = 1.0
RETRY_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Written:
    record: ReplicaRecord
    at_s: float


class ReplicaPublisher:
    """Owner of this worker's replica records: what they should be, and what was written last."""

    def __init__(
        self,
        cluster: Cluster,
        worker_id: WorkerId,
        *,
        coalesce_s: float = COALESCE_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._worker_id = worker_id
        self._coalesce_s = coalesce_s
        self._monotonic = monotonic
        self._lease: Lease | None = None
        self._wanted: dict[ModelName, ReplicaRecord | None] = {}
        self._written: dict[ModelName, _Written] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin in the background; nothing is written before there is a lease."""
        self._task = asyncio.create_task(self._run(), name="replica-publisher")

    async def stop(self) -> None:
        """End; what was not written stays unwritten. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def use_lease(self, lease: Lease) -> None:
        """Write every record again, under this lease."""
        self._lease = lease
        self._written.clear()
        self._changed.set()

    async def write_under(self, lease: Lease) -> None:
        """Write every record under a new lease, before anybody sees the worker under it.

        Who sees a worker sees what it hosts. Raises Unavailable, and Conflict when the lease ended.
        """
        for record in self.records():
            await self._cluster.put_replica(record, lease=lease)

    def publish(self, record: ReplicaRecord) -> None:
        """Have `record` stand in cluster state."""
        self._wanted[record.model] = record
        self._changed.set()

    def withdraw(self, model: ModelName) -> None:
        """Have no record of `model` in cluster state."""
        self._wanted[model] = None
        self._changed.set()

    def records(self) -> tuple[ReplicaRecord, ...]:
        """Return what stands or is about to."""
        return tuple(record for record in self._wanted.values() if record is not None)

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            pause_s = await self._write_what_is_due()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()

    async def _write_what_is_due(self) -> float | None:
        """Write and return in how many seconds something is due, None when nothing is."""
        lease = self._lease
        if lease is None or lease.is_lost:
            return None
        pauses = []
        for model, record in tuple(self._wanted.items()):
            wait_s = self._wait_s(model, record)
            if wait_s is None:
                continue
            if wait_s > 0:
                pauses.append(wait_s)
                continue
            try:
                await self._write(model, record, lease)
            except Conflict:
                return None  # the lease ended: all is written again under the next
            except GearfallError as error:
                _log.warning("replica not published", extra={"error": error.message})
                pauses.append(RETRY_S)
        return min(pauses, default=None)

    def _wait_s(self, model: ModelName, record: ReplicaRecord | None) -> float | None:
        """Return how long the write of `record` has to wait, None when there is nothing to do."""
        written = self._written.get(model)
        if record is None or written is None:
            return 0.0
        if record == written.record:
            return None
        if _is_urgent(record, written.record):
            return 0.0
        is_kv_news = abs(record.kv_share - written.record.kv_share) >= KV_STEP
        coalesce_s = min(self._coalesce_s, KV_INTERVAL_S) if is_kv_news else self._coalesce_s
        return max(0.0, written.at_s + coalesce_s - self._monotonic())

    async def _write(self, model: ModelName, record: ReplicaRecord | None, lease: Lease) -> None:
        if record is not None:
            await self._cluster.put_replica(record, lease=lease)
            if self._lease is lease:
                self._written[model] = _Written(record, self._monotonic())
            return
        await self._cluster.delete_replica(self._worker_id, model)
        self._written.pop(model, None)
        if self._wanted.get(model, record) is None:
            self._wanted.pop(model, None)


def _is_urgent(record: ReplicaRecord, last: ReplicaRecord) -> bool:
    return any(
        getattr(record, name) != getattr(last, name)
        for name in ("state", "pid", "error", "is_adrift")
    )
