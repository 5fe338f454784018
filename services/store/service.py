"""What a store does: registers, loads, hands out and removes models. No gRPC in here."""

import asyncio
import logging
import math
from weakref import WeakValueDictionary

from gearfall.core.errors import Conflict, InvalidRequest, NotFound
from gearfall.core.ids import ModelName, parse_name
from gearfall.core.records import NodeRecord
from gearfall.core.tiers import Tier
from gearfall.infra.memory.native import read_chunks
from gearfall.infra.state.cluster import Cluster
from services.store.attach_server import AttachServer
from services.store.loading.load import LoadFlight
from services.store.loading.loader import Loader
from services.store.loading.wishes import Wishes
from services.store.metrics import StoreFigures, StoreMetrics
from services.store.models.canaries import Canaries, ComputeCanary
from services.store.models.canary_process import CanaryProcess
from services.store.models.catalogue import Catalogue
from services.store.models.ledger import Ledger
from services.store.models.model_registry import ModelRegistry
from services.store.models.registration import RegisterFlight, Registrations
from services.store.presence import Presence
from services.store.settings import StoreSettings
from services.store.sources.elsewhere import ClusterCopies, Elsewhere
from services.store.sources.side_files import SideFiles
from services.store.sources.transfers import Transfers
from services.store.tiers.pool import Pool
from services.store.tiers.pool_memory import ReadChunks
from services.store.tiers.spare_memory import SpareMemory
from services.store.tiers.ssd_room import SsdRoom
from services.store.tiers.ssd_tier import SsdTier
from services.store.tiers.stored_model import StoredModel

_log = logging.getLogger(__name__)


class StoreService:
    """Owns tiers, loader, attach socket and presence of one node."""

    def __init__(
        self,
        settings: StoreSettings,
        cluster: Cluster,
        *,
        read: ReadChunks = read_chunks,
        compute_canary: ComputeCanary | None = None,
    ) -> None:
        """`read` reads and digests chunks: the native reader, or a slower one in tests.

        `compute_canary`: in a process of its own, or scripted in tests.
        """
        self.settings = settings
        self.address = ""
        self.ssd = SsdTier(settings.data_dir)
        self.catalogue = Catalogue(settings.data_dir)
        self.pool = Pool(
            settings.dram_bytes,
            on_change=self._notify,
            bandwidth_below=self._bandwidth_below,
            allocator=SpareMemory(settings.spare_bytes) if settings.spare_bytes else None,
        )
        self.metrics = StoreMetrics()
        self.loader = Loader(
            self.ssd,
            self.pool,
            read,
            on_broken=self._notify,
            on_ended=self.metrics.count_load,
        )
        self.transfers = Transfers(self.ssd, self.pool, settings.bulk_host)
        self.attach = AttachServer(self.pool, settings.attach_dir, self.loader.filling_of)
        self._canary_process = CanaryProcess()
        compute = compute_canary or self._canary_process.compute
        self._canaries = Canaries(compute, self._notify)
        self._ledger = Ledger(settings.data_dir)
        self._registry = ModelRegistry(cluster, settings.node_id, self._ledger)
        copies = ClusterCopies(cluster, self._registry, self.catalogue)
        self.room = SsdRoom(
            settings.ssd_bytes,
            self.ssd,
            copies,
            is_busy=self._is_busy,
            expected_use=self.pool.expected_use,
            bandwidth=lambda: self.loader.bandwidth_of(Tier.REMOTE),
        )
        elsewhere = self.loader.far = Elsewhere(
            cluster,
            self._registry,
            catalogue=self.catalogue,
            ssd=self.ssd,
            room=self.room,
            on_arrived=self._notify,
            memory_for=self.pool.memory_for,
        )
        self._side_files = SideFiles(self.ssd, self.catalogue, elsewhere, self._canaries)
        self._presence = Presence(
            cluster, self._registry, self.describe, self._stored, self._drop_removed
        )
        self._wishes = Wishes(cluster, settings.node_id, self, on_ended=self.metrics.count_wish)
        self._tasks: asyncio.Task[None] | None = None
        self._locks: WeakValueDictionary[ModelName, asyncio.Lock] = WeakValueDictionary()
        self._removing: set[ModelName] = set()
        self._registrations = Registrations(
            self.ssd,
            self.catalogue,
            room=self.room,
            registry=self._registry,
            canaries=self._canaries,
            lock_of=self._lock,
            on_changed=self._notify,
            wait_told=self._presence.wait_told,
        )

    async def open(self) -> None:
        """Find the SSD tier again and open the attach socket: calls can be answered from here on.

        Raises Conflict when another store uses the data directory.
        """
        await asyncio.to_thread(self.ssd.open)
        await asyncio.to_thread(self.catalogue.open)
        self._ledger.open()
        self.attach.open()
        self.transfers.start()

    async def start(self, address: str) -> None:
        """Start to load and lease, and return once the node is published under `address`."""
        self.address = address
        self._notify()
        self._tasks = asyncio.create_task(self._run(), name="store")
        published = asyncio.create_task(self._presence.wait_published())
        await asyncio.wait((self._tasks, published), return_when=asyncio.FIRST_COMPLETED)
        published.cancel()
        if self._tasks.done():
            await self._tasks

    async def stop(self) -> None:
        """Withdraw the node, end all work and free the pool. Idempotent."""
        self._registrations.stop()
        self.loader.stop()
        await self._registrations.wait_ended()
        if self._tasks is not None:
            self._tasks.cancel()
            await asyncio.wait((self._tasks,))
            self._tasks = None
        await self.room.stop()
        await self._canaries.stop()
        await self._canary_process.stop()
        self._registry.note_seen(after=1)
        await self._presence.withdraw()
        self.attach.close()
        self.transfers.close()
        self.pool.close()
        self.ssd.close()

    async def wait_failed(self) -> None:
        """Wait until a part of the store ends unexpectedly, and raise what ended it."""
        assert self._tasks is not None
        await asyncio.shield(self._tasks)

    def register(self, name_text: str, path: str, base: str = "") -> RegisterFlight:
        """Register a directory or a URL; see `Registrations.begin`."""
        name = ModelName(parse_name(name_text, param="name"))
        return self._registrations.begin(name, path, base)

    def load(
        self,
        name_text: str,
        priority: int = 0,
        target: Tier = Tier.DRAM,
        *,
        wanted_unix_s: float = 0.0,
    ) -> LoadFlight:
        """Bring a model up to a tier. Raises NotFound, CorruptCheckpoint or InvalidRequest."""
        if not 0.0 <= wanted_unix_s < math.inf:
            raise InvalidRequest("a load is wanted since some moment", param="wanted_unix_s")
        if target not in {Tier.SSD, Tier.DRAM}:
            raise InvalidRequest("a store loads to SSD or DRAM", param="target")
        name = _model(name_text)
        if name in self._removing:
            raise NotFound(f"model {name!r} is being removed", param="model")
        return self.loader.load(name, priority, target, wanted_unix_s=wanted_unix_s)

    def cancel_prefetch(self, name_text: str) -> bool:
        """Give up a load that nobody waits for; False when there is none."""
        return self.loader.cancel_prefetch(_model(name_text))

    def has(self, model: ModelName, tier: Tier) -> bool:
        """Whether the whole model is in the pool, or on SSD."""
        if tier is Tier.DRAM:
            return self.pool.peek(model) is not None
        return model in self.ssd.models

    def open_transfer(
        self, name_text: str, digest: str, connections: int
    ) -> tuple[bytes, list[bytes]]:
        """Let a neighbour read a model; see `Transfers.open`."""
        return self.transfers.open(_model(name_text), digest, connections)

    def unload(self, name_text: str) -> int:
        """Drop a model from the pool, return its bytes. Raises Conflict while it is leased."""
        return self.pool.drop(_model(name_text))

    async def delete(self, name_text: str) -> None:
        """Remove a model from every tier and this node from its record.

        Raises NotFound if neither this node nor cluster state knows it, Conflict while it is
        leased, loaded or registered.
        """
        name = _model(name_text)
        lock = self._lock(name)
        if lock.locked() or self.loader.is_loading(name):
            raise Conflict(f"model {name!r} is being loaded, registered or removed")
        self.pool.check_unleased(name)
        self._removing.add(name)
        async with lock:
            try:
                await self._remove(name)
            finally:
                self._removing.discard(name)

    async def read_file(self, name_text: str, file: str) -> bytes:
        """Return a small file; see `SideFiles`."""
        return await self._side_files.read_file(_model(name_text), file)

    async def read_canary(self, name_text: str) -> bytes:
        """Return a model's canary as JSON; see `SideFiles`."""
        name = _model(name_text)
        return await self._side_files.read_canary(name, lambda tier: self.load(name, target=tier))

    def describe(self) -> NodeRecord:
        """Return the node's record as it is now."""
        return NodeRecord(
            node_id=self.settings.node_id,
            address=self.address,
            attach_socket=str(self.attach.path),
            dram_capacity_bytes=self.pool.capacity_bytes,
            dram_used_bytes=self.pool.used_bytes,
            ssd_bytes_per_s=self.loader.bytes_per_s,
            resident=tuple(resident.model for resident in self.pool.residents),
            remote_bytes_per_s=self.loader.bandwidth_of(Tier.REMOTE),
            ssd_capacity_bytes=self.room.capacity_bytes,
            ssd_used_bytes=self.room.used_bytes,
            on_ssd=tuple(sorted(self.ssd.models)),
            preparing=self._canaries.preparing,
        )

    def render_metrics(self) -> bytes:
        """Return what Prometheus scrapes."""
        pool, room, loader = self.pool, self.room, self.loader
        return self.metrics.render(
            StoreFigures(
                capacity_bytes={Tier.SSD: room.capacity_bytes, Tier.DRAM: pool.capacity_bytes},
                used_bytes={Tier.SSD: room.used_bytes, Tier.DRAM: pool.used_bytes},
                models={Tier.SSD: len(self.ssd.models), Tier.DRAM: len(pool.residents)},
                queued_bytes={
                    Tier.REMOTE: loader.queued_bytes_of(is_far=True),
                    Tier.SSD: loader.queued_bytes_of(is_far=False),
                },
                bytes_per_s={t: loader.bandwidth_of(t) for t in (Tier.REMOTE, Tier.SSD)},
                leases=sum(len(pool.holders(each.model)) for each in pool.residents),
                broken_models=len(self.ssd.broken),
                pending_wishes=len(self._wishes.pending),
            )
        )

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.loader.run())
            tasks.create_task(self.attach.run())
            tasks.create_task(self._presence.run())
            tasks.create_task(self._wishes.run())

    async def _drop_removed(self, name: ModelName) -> None:
        """Drop a model that the cluster has forgotten, unless it is in use: then later."""
        if self._is_busy(name) or self._lock(name).locked():
            return
        if self.pool.peek(name) is not None:
            self.pool.drop(name)
        await asyncio.to_thread(self._registrations.discard, name)
        self._registry.forget(name)
        _log.info("model dropped: it was removed from the cluster", extra={"model": name})

    def _is_busy(self, name: ModelName) -> bool:
        return bool(self.pool.holders(name)) or self.loader.is_loading(name)

    def _bandwidth_below(self, name: ModelName) -> float:
        return self.loader.bandwidth_of(Tier.SSD if name in self.ssd.models else Tier.REMOTE)

    async def _remove(self, name: ModelName) -> None:
        # Dropped before the first await: no lease can be taken between the check and the removal.
        if self.pool.get(name) is not None:
            self.pool.drop(name)
        is_here = name in self._stored() or name in self.ssd.broken
        was_recorded = await self._registry.withdraw(name, forget=True)
        if not is_here and not was_recorded:
            raise NotFound(f"model {name!r} is not registered", param="model")
        await asyncio.to_thread(self._registrations.discard, name)
        self.pool.forget(name)
        self._registry.forget(name)
        self._notify()
        _log.info("model removed", extra={"model": name})

    def _stored(self) -> dict[ModelName, StoredModel]:
        # Copied in one step: registrations add to it from their threads.
        models = {**self.catalogue.models, **self.ssd.models}
        gone = self._removing | (self.room.leaving - self.catalogue.models.keys())
        return {name: model for name, model in models.items() if name not in gone}

    def _lock(self, name: ModelName) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _notify(self) -> None:
        self._presence.notify()
        self.pool.allocator.want(self._next_loads())

    def _next_loads(self) -> list[list[int]]:
        """Return the partition sizes of every model that could come to the pool."""
        manifests = [
            model.manifest for name, model in self._stored().items() if not self.pool.peek(name)
        ]
        return [
            [partition.size_bytes for partition in manifest.partitions]
            for manifest in manifests
            if manifest.size_bytes <= self.pool.capacity_bytes
        ]


def _model(name_text: str) -> ModelName:
    return ModelName(parse_name(name_text, param="model"))
