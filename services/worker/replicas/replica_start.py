"""The way to a running engine: load, lease, fork; each undone in reverse when it ends.

    load   |--------------------------------|
    lease    |------------------------------------- ...
    engine     |--build--|--canary, behind the load--| ready

The lease is taken as soon as the load has memory, and the engine computes behind what is verified.
It is ready when the store has said that all of it is.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from gearfall.core.errors import DeadlineExceeded, InvalidRequest, NotFound, Unavailable
from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.ids import NodeId, WorkerId
from gearfall.core.memory import kv_capacity_tokens
from gearfall.core.records import AssignmentRecord, ModelRecord
from services.worker.engine_link.messages import EngineKind, EngineReady, StartEngine, SubmitJob
from services.worker.ports import (
    EngineProcess,
    EngineSpawner,
    LeasableModel,
    LeaseTaker,
    LoadedModel,
    OnLeasable,
    PoolLease,
    StoreClient,
)
from services.worker.replicas.start_clock import StartClock

EXIT_TIMEOUT_S = 5.0
READY_TIMEOUT_S = 600.0
"""Longest an engine may take to be ready, from the end of its model's load on."""
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
    engine: EngineKind = EngineKind.GEARFALL
    arithmetic: Arithmetic = Arithmetic.EXACT


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


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A lease, and the load that it may be ahead of."""

    lease: PoolLease
    loading: asyncio.Task[LoadedModel]


@asynccontextmanager
async def leased(
    model: ModelRecord, settings: ReplicaSettings, ports: StartPorts, clock: StartClock
) -> AsyncIterator[HeldModel]:
    """Have the store load `model` and hold a lease on it, as early as there is one to be had."""
    leasable: asyncio.Future[LeasableModel] = asyncio.get_running_loop().create_future()

    def on_leasable(found: LeasableModel) -> None:
        if not leasable.done():
            leasable.set_result(found)

    loading = asyncio.create_task(_load(model, ports, clock, on_leasable))
    try:
        lease = await _take_lease(model, settings, ports, loading, leasable)
        clock.end_attach(ports.monotonic())
        try:
            yield HeldModel(lease, loading)
        finally:
            lease.close()
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)


async def _load(
    model: ModelRecord, ports: StartPorts, clock: StartClock, on_leasable: OnLeasable
) -> LoadedModel:
    loaded = await ports.store.load_model(
        model.name,
        on_leasable,
        wanted_unix_s=clock.assigned_unix_s,
        on_begun=lambda: clock.begin_load(ports.monotonic()),
    )
    clock.end_load(ports.monotonic(), loaded.timeline)
    return loaded


async def _take_lease(
    model: ModelRecord,
    settings: ReplicaSettings,
    ports: StartPorts,
    loading: asyncio.Task[LoadedModel],
    leasable: asyncio.Future[LeasableModel],
) -> PoolLease:
    either: set[asyncio.Future[Any]] = {loading, leasable}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        early = leasable.result()
        # The load may end meanwhile: then it says why, or the model is resident.
        with contextlib.suppress(Unavailable):
            return await ports.take_lease(
                early.attach_socket,
                model.name,
                early.digest,
                settings.worker_id,
                accepts_filling=True,
            )
    loaded = await loading
    return await ports.take_lease(
        loaded.attach_socket, model.name, loaded.digest, settings.worker_id
    )


@asynccontextmanager
async def spawned(
    model: ModelRecord,
    settings: ReplicaSettings,
    ports: StartPorts,
    held: HeldModel,
    files: StartFiles,
    *,
    clock: StartClock,
    expected: tuple[SubmitJob, ...] = (),
) -> AsyncIterator[EngineProcess]:
    """Fork an engine over what is `held`; it is gone when this ends.

    What it computes of the `expected` jobs it keeps until they are submitted.
    """
    start = _start_message(model, settings, held.lease, files, expected)
    clock.begin_process(ports.monotonic())
    news = () if held.lease.news_fd is None else (held.lease.news_fd,)
    engine = await ports.spawner.spawn(start, (*held.lease.partition_fds, *news))
    clock.end_process(ports.monotonic())
    try:
        yield engine
    finally:
        engine.kill()
        with contextlib.suppress(DeadlineExceeded):
            await within(EXIT_TIMEOUT_S, engine.wait_exit(), "the engine's exit")


def _start_message(
    model: ModelRecord,
    settings: ReplicaSettings,
    lease: PoolLease,
    files: StartFiles,
    expected: tuple[SubmitJob, ...],
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
        is_loading=lease.news_fd is not None,
        expected=expected,
        engine=settings.engine,
        arithmetic=settings.arithmetic,
    )


async def ready(engine: EngineProcess, held: HeldModel) -> EngineReady:
    """Return when the engine serves a model that is loaded and verified to its last byte.

    The lease ends here where the engine has a copy of its own: the room may go to others.
    Raises what load or engine failed with, DeadlineExceeded when the engine takes too long.
    """
    readying = asyncio.ensure_future(engine.ready())
    try:
        either: set[asyncio.Future[Any]] = {held.loading, readying}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not held.loading.done():
            await readying
        await held.loading
        found = await within(READY_TIMEOUT_S, readying, "the engine's start")
    finally:
        readying.cancel()
        await asyncio.gather(readying, return_exceptions=True)
    if not found.needs_pool:
        held.lease.close()
    return found


def check_runs_alone(assignment: AssignmentRecord) -> None:
    """Raise InvalidRequest for a share of a replica on several workers: no engine here has that."""
    if assignment.group:
        raise InvalidRequest(
            f"{assignment.model} is assigned to workers {', '.join(assignment.group)} together, "
            "and a worker's engine runs on its own: deploy it with accelerators=1",
            param="accelerators",
        )


async def within(seconds: float, awaitable: Awaitable[T], what: str) -> T:
    """Await for at most `seconds`, then raise DeadlineExceeded naming `what`."""
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError:
        raise DeadlineExceeded(f"{what} took more than {seconds:g} s") from None
