"""Keeps this node's record true in cluster state, and its part of the models' records."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from gearfall.core.errors import Conflict, GearfallError
from gearfall.core.ids import ModelName
from gearfall.core.ports import Lease
from gearfall.core.records import NodeRecord
from gearfall.infra.state.cluster import Cluster
from services.store.lone_node import check_is_free
from services.store.models.model_registry import ModelRegistry
from services.store.tiers.stored_model import StoredModel

LEASE_TTL_S = 5.0
TOLD_TIMEOUT_S = 1.0
_MAX_BACKOFF_S = 2.0
_log = logging.getLogger(__name__)


class Presence:
    """Owns the node's lease. `run` publishes on every change and after every loss."""

    def __init__(
        self,
        cluster: Cluster,
        registry: ModelRegistry,
        describe: Callable[[], NodeRecord],
        stored: Callable[[], dict[ModelName, StoredModel]],
        drop: Callable[[ModelName], Awaitable[None]],
    ) -> None:
        """`describe` and `stored` say what is true now: the node, and the models it can load.

        `drop` removes a model that was removed from the cluster while this node did not listen.
        """
        self._cluster = cluster
        self._registry = registry
        self._describe = describe
        self._stored = stored
        self._drop = drop
        self._changed = asyncio.Event()
        self._is_published = asyncio.Event()
        self._lease: Lease | None = None
        self._published_revision = 0
        self._waiting: list[asyncio.Future[None]] = []
        """Done by the next publication that begins from now on."""

    def notify(self) -> None:
        """Say that the node or its models changed."""
        self._changed.set()

    async def wait_published(self) -> None:
        """Return once the node and its models were published for the first time."""
        await self._is_published.wait()

    async def wait_told(self) -> None:
        """Return once all that is true now is published; after TOLD_TIMEOUT_S in any case."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(told)
        self.notify()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TOLD_TIMEOUT_S):
                await told

    async def run(self) -> None:
        """Publish until cancelled; what fails is tried again, with a growing pause."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_models())
            pause_s = 0.05
            while True:
                try:
                    lease = await self._hold_lease()
                    await self._publish(lease)
                    pause_s = 0.05
                    await self._wait_change(lease)
                except GearfallError as error:
                    _log.warning("node not published", extra={"error": error.message})
                    if isinstance(error, Conflict):
                        # The lease has ended at the server, whatever our clock says.
                        await self.withdraw()
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _MAX_BACKOFF_S)

    async def withdraw(self) -> None:
        """Take the node out of cluster state; best effort, the lease's end does it too."""
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                await lease.revoke()
            except GearfallError as error:
                _log.warning("lease not revoked", extra={"error": error.message})

    async def _hold_lease(self) -> Lease:
        if self._lease is None or self._lease.is_lost:
            self._lease = await self._cluster.grant_lease(LEASE_TTL_S)
        return self._lease

    async def _publish(self, lease: Lease) -> None:
        # Cleared first: a change that comes while we write is published in the next round.
        self._changed.clear()
        waiting = tuple(self._waiting)
        for removed in await self._registry.reconcile(self._stored()):
            await self._drop(removed)
        self._published_revision = await self._cluster.put_node(self._describe(), lease=lease)
        self._is_published.set()
        for told in waiting:
            self._waiting.remove(told)
            if not told.done():
                told.set_result(None)

    async def _wait_change(self, lease: Lease) -> None:
        waits = [
            asyncio.ensure_future(self._changed.wait()),
            asyncio.ensure_future(lease.wait_lost()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _watch_models(self) -> None:
        """Correct what others' writes or a loss of state made untrue."""
        async for kinds in self._cluster.changes():
            self._registry.note_seen()
            if "nodes" in kinds:
                await self._check_is_lone()
            if ("models" in kinds and not self._is_listed()) or (
                "nodes" in kinds and self._describe().node_id not in self._cluster.view.nodes
            ):
                self.notify()

    async def _check_is_lone(self) -> None:
        """Raise Conflict when a live store has written over this one's record: that one stays."""
        view, own = self._cluster.view, self._describe()
        record = view.nodes.get(own.node_id)
        has_seen_own = 0 < self._published_revision <= view.revision
        if has_seen_own and record is not None and record.address != own.address:
            await check_is_free(view, own.node_id)

    def _is_listed(self) -> bool:
        node_id, models = self._describe().node_id, self._cluster.view.models
        listed = {name for name, record in models.items() if node_id in record.nodes}
        return listed == self._stored().keys()
