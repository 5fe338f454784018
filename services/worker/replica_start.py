"""The way to a running engine: load, lease, fork; each undone in reverse when it ends."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from gearfall.core.errors import DeadlineExceeded, NotFound
from gearfall.core.ids import NodeId, WorkerId
from gearfall.core.memory import kv_capacity_tokens
from gearfall.core.records import ModelRecord
from services.worker.engine_messages import StartEngine
from services.worker.ports import EngineProcess, EngineSpawner, LeaseTaker, PoolLease, StoreClient
from services.worker.start_clock import StartClock

EXIT_TIMEOUT_S = 5.0
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What all replicas of a worker share."""

    worker_id: WorkerId
    node_id: NodeId
    device: str
    slots: int
    threads: int
    claim_block_s: float = 0.5
    """Longest a claim blocks: so soon a dead worker's jobs and a drain are noticed."""


@dataclass(frozen=True, slots=True)
class StartPorts:
    """What a start needs from outside."""

    store: StoreClient
    take_lease: LeaseTaker
    spawner: EngineSpawner
    monotonic: Callable[[], float] = time.monotonic


@asynccontextmanager
async def leased(
    model: ModelRecord, settings: ReplicaSettings, ports: StartPorts, clock: StartClock
) -> AsyncIterator[PoolLease]:
    """Have the store load `model` and hold a lease on it."""
    clock.begin_load(ports.monotonic())
    loaded = await ports.store.load_model(model.name)
    clock.end_load(ports.monotonic(), loaded.timeline)
    lease = await ports.take_lease(
        loaded.attach_socket, model.name, loaded.digest, settings.worker_id
    )
    clock.end_attach(ports.monotonic())
    try:
        yield lease
    finally:
        lease.close()


@asynccontextmanager
async def spawned(
    model: ModelRecord,
    settings: ReplicaSettings,
    ports: StartPorts,
    lease: PoolLease,
    clock: StartClock,
) -> AsyncIterator[EngineProcess]:
    """Fork an engine over `lease`; it is gone when this ends."""
    start = await _start_message(model, settings, ports.store, lease)
    clock.begin_process(ports.monotonic())
    engine = await ports.spawner.spawn(start, lease.partition_fds)
    clock.end_process(ports.monotonic())
    try:
        yield engine
    finally:
        engine.kill()
        with contextlib.suppress(DeadlineExceeded):
            await within(EXIT_TIMEOUT_S, engine.wait_exit(), "the engine's exit")


async def _start_message(
    model: ModelRecord, settings: ReplicaSettings, store: StoreClient, lease: PoolLease
) -> StartEngine:
    try:
        generation_config = await store.read_file(model.name, GENERATION_CONFIG_FILE)
    except NotFound:
        generation_config = b""
    return StartEngine(
        model=model.name,
        manifest_json=lease.manifest_json,
        config_json=await store.read_file(model.name, CONFIG_FILE),
        generation_config_json=generation_config,
        device=settings.device,
        threads=settings.threads,
        slots=settings.slots,
        kv_tokens=kv_capacity_tokens(model, settings.slots),
    )


async def within(seconds: float, awaitable: Awaitable[T], what: str) -> T:
    """Await for at most `seconds`, then raise DeadlineExceeded naming `what`."""
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError:
        raise DeadlineExceeded(f"{what} took more than {seconds:g} s") from None
