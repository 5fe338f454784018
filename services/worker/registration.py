"""Keeps the worker's record in cluster state: under a lease, and a new one when that is lost."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from gearfall.core.errors import Conflict, GearfallError, Unavailable
from gearfall.core.ports import Lease
from gearfall.core.records import WorkerRecord
from gearfall.infra.state.cluster import Cluster

LEASE_TTL_S = 5.0
RETRY_S = 0.5

_log = logging.getLogger(__name__)


class Registration:
    """Owner of the worker's lease. While cluster state is down the worker goes on unregistered."""

    def __init__(
        self,
        cluster: Cluster,
        on_lease: Callable[[Lease], None],
        *,
        before: Callable[[Lease], Awaitable[None]] | None = None,
        ttl_s: float = LEASE_TTL_S,
        retry_s: float = RETRY_S,
    ) -> None:
        """`on_lease` hears of every new lease after the worker's record stands under it; `before`
        writes under it what has to stand there by then."""
        self._cluster = cluster
        self._on_lease = on_lease
        self._before = before
        self._ttl_s = ttl_s
        self._retry_s = retry_s
        self._record: WorkerRecord | None = None
        self._lease: Lease | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_forgotten = asyncio.Event()

    def note_loss(self) -> None:
        """Cluster state lost its memory, this worker's lease with it: do not wait for its end."""
        self._is_forgotten.set()

    async def start(self, record: WorkerRecord) -> None:
        """Register and keep registered. Raises Unavailable when the first attempt fails."""
        self._record = record
        await self._register()
        self._task = asyncio.create_task(self._keep(), name="registration")

    async def update(self, record: WorkerRecord) -> None:
        """Replace the record; under the next lease if this one has ended. May raise Unavailable."""
        self._record = record
        if self._lease is not None:
            with contextlib.suppress(Conflict):
                await self._cluster.put_worker(record, lease=self._lease)

    async def stop(self) -> None:
        """Deregister: the lease ends and with it all that stands under it. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._lease is not None:
            with contextlib.suppress(Unavailable):
                await self._lease.revoke()

    async def _register(self) -> None:
        assert self._record is not None
        lease = await self._cluster.grant_lease(self._ttl_s)
        try:
            if self._before is not None:
                await self._before(lease)
            await self._cluster.put_worker(self._record, lease=lease)
        except BaseException:
            with contextlib.suppress(Unavailable):
                await lease.revoke()
            raise
        self._lease = lease
        self._on_lease(lease)

    async def _keep(self) -> None:
        while True:
            await self._wait_lost()
            try:
                await self._register()
            except GearfallError as error:
                _log.warning("not registered", extra={"error": error.message})
                await asyncio.sleep(self._retry_s)

    async def _wait_lost(self) -> None:
        """Return when this worker has to register again."""
        if self._lease is None or self._lease.is_lost:
            return
        waits = (
            asyncio.ensure_future(self._lease.wait_lost()),
            asyncio.ensure_future(self._is_forgotten.wait()),
        )
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
        if self._is_forgotten.is_set():
            self._is_forgotten.clear()
            await self._give_up_lease()
        _log.warning("lease lost, registering again")

    async def _give_up_lease(self) -> None:
        """End the lease of a state that is gone, lest it is renewed for ever."""
        if self._lease is not None:
            with contextlib.suppress(Unavailable):
                await self._lease.revoke()
