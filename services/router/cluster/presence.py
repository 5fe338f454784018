"""Keeps the router's record in cluster state, under a lease that is renewed when it was lost."""

import asyncio
import logging
from collections.abc import Callable

from gearfall.core.errors import GearfallError
from gearfall.core.ports import Lease
from gearfall.core.records import RouterRecord
from gearfall.infra.state.cluster import Cluster

_log = logging.getLogger(__name__)

LEASE_TTL_S = 5.0
_RETRY_S = 0.5


class Presence:
    """Publishes one RouterRecord for as long as `run` runs."""

    def __init__(
        self, cluster: Cluster, record: RouterRecord, on_lease: Callable[[Lease], None]
    ) -> None:
        """`on_lease` is called with each new lease."""
        self._cluster = cluster
        self._record = record
        self._on_lease = on_lease
        self._lease: Lease | None = None
        self._is_stopped = False

    async def run(self) -> None:
        """Hold a lease and the record under it, for ever."""
        while not self._is_stopped:
            try:
                self._lease = await self._publish()
            except GearfallError as error:
                _log.warning("can't publish this router", extra={"error": error.message})
                await asyncio.sleep(_RETRY_S)
                continue
            self._on_lease(self._lease)
            await self._lease.wait_lost()
            if not self._is_stopped:
                _log.warning("the router's lease was lost")

    async def stop(self) -> None:
        """End the lease: the record and this router's demand go at once."""
        self._is_stopped = True
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                await lease.revoke()
            except GearfallError as error:
                _log.info("could not revoke the lease", extra={"error": error.message})

    async def _publish(self) -> Lease:
        lease = await self._cluster.grant_lease(LEASE_TTL_S)
        await self._cluster.put_router(self._record, lease=lease)
        return lease
