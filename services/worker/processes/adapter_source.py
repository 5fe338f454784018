"""Where a worker's adapters come from: its node's store, by the way that models come."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gearfall.core.checkpoint.manifest import parse_manifest
from gearfall.core.errors import Unavailable
from gearfall.core.ids import ModelName, WorkerId
from services.worker.ports import LeaseTaker, StoreClient

ADAPTER_CONFIG_FILE = "adapter_config.json"
RETRY_DELAYS_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
"""A store that can't be reached, or starts anew, is asked again after these pauses."""


class AdapterLease(Protocol):
    """The part of `services.worker.ports.PoolLease` that an adapter needs."""

    @property
    def manifest_json(self) -> bytes:
        """The verified manifest's bytes."""
        ...

    @property
    def partition_fds(self) -> Sequence[int]:
        """One descriptor per partition, owned by the lease."""
        ...

    def close(self) -> None:
        """Give it back. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Brought:
    """An adapter in the pool, leased."""

    digest: str
    size_bytes: int
    config_json: bytes
    lease: AdapterLease
    """The owner's to close."""


class AdapterSource(Protocol):
    """Brings adapters."""

    async def __call__(self, adapter: ModelName, /) -> Brought:
        """Raise the store's error when it can't be had."""
        ...


class StoreAdapters:
    """Brings adapters from the node's store. Implements `AdapterSource`."""

    def __init__(
        self,
        store: StoreClient,
        take_lease: LeaseTaker,
        worker_id: WorkerId,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._take_lease = take_lease
        self._worker_id = worker_id
        self._sleep = sleep

    async def __call__(self, adapter: ModelName) -> Brought:
        """Have the store load the adapter and lease it; ask again while the store is away."""
        for delay_s in RETRY_DELAYS_S:
            try:
                return await self._bring(adapter)
            except Unavailable:
                await self._sleep(delay_s)
        return await self._bring(adapter)

    async def _bring(self, adapter: ModelName) -> Brought:
        config_json = await self._store.read_file(adapter, ADAPTER_CONFIG_FILE)
        loaded = await self._store.load_model(adapter)
        lease = await self._take_lease(
            loaded.attach_socket, adapter, loaded.digest, self._worker_id
        )
        return Brought(
            loaded.digest, parse_manifest(lease.manifest_json).size_bytes, config_json, lease
        )
