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


@dataclass(frozen=True, slots=True)
class StartFiles:
    """What an engine needs beside the weights."""

    config_json: bytes
    generation_config_json: bytes
    canary_json: bytes


@asynccontextmanager
async def fetching(model: ModelRecord, store: StoreClient) -> AsyncIterator[Awaitable[StartFiles]]:
    """Fetch the files of `model` while the load runs."""
    fetch = asyncio.create_task(_fetch_files(model, store))
    try:
        yield fetch
    finally:
        fetch.cancel()
        await asyncio.gather(fetch, return_exceptions=True)


async def _fetch_files(model: ModelRecord, store: StoreClient) -> StartFiles:
    config, generation_config, canary = await asyncio.gather(
        store.read_file(model.name, CONFIG_FILE),
        _read_if_there(model, store, GENERATION_CONFIG_FILE),
        store.read_canary(model.name),
    )
    return StartFiles(config, generation_config, canary)


async def _read_if_there(model: ModelRecord, store: StoreClient, file: str) -> bytes:
    try:
        return await store.read_file(model.name, file)
    except NotFound:
        return b""


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
    files: StartFiles,
    *,
    clock: StartClock,
) -> AsyncIterator[EngineProcess]:
    """Fork an engine over `lease`; it is gone when this ends."""
    start = _start_message(model, settings, lease, files)
    clock.begin_process(ports.monotonic())
    engine = await ports.spawner.spawn(start, lease.partition_fds)
    clock.end_process(ports.monotonic())
    try:
        yield engine
    finally:
        engine.kill()
        with contextlib.suppress(DeadlineExceeded):
            await within(EXIT_TIMEOUT_S, engine.wait_exit(), "the engine's exit")


def _start_message(
    model: ModelRecord, settings: ReplicaSettings, lease: PoolLease, files: StartFiles
) -> StartEngine:
    return StartEngine(
        model=model.name,
        manifest_json=lease.manifest_json,
        config_json=files.config_json,
        generation_config_json=files.generation_config_json,
        canary_json=files.canary_json,
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
