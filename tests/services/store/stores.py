"""A whole store in the test's process: real files, real gRPC, cluster state in memory."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.canary import Canary
from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import ModelRecord, NodeRecord
from gearfall.infra.memory.native import read_chunks
from gearfall.infra.memory.pool_lease import PoolLease, take_lease
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_errors import error_from_rpc
from gearfall.infra.net.grpc_server import start_server
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState, MemoryStateServer
from gearfall.pb import store_pb2 as pb
from gearfall.pb.store_pb2_grpc import StoreStub, add_StoreServicer_to_server
from services.store.models.canaries import ComputeCanary
from services.store.models.canary_process import CanaryRequest
from services.store.service import StoreService
from services.store.servicer import StoreServicer
from services.store.settings import StoreSettings
from services.store.tiers.pool_memory import ReadChunks
from services.store.tiers.spare_memory import SPARE_BYTES

if TYPE_CHECKING:
    from gearfall.pb.store_pb2_grpc import StoreAsyncStub

TIMEOUT_S = 20.0


@dataclass
class RunningStore:
    """A store, its client, and the cluster as another process sees it."""

    service: StoreService
    stub: "StoreAsyncStub"
    cluster: Cluster
    state: MemoryState
    node_id: NodeId

    async def register(self, name: str, path: Path | str) -> list[pb.RegisterProgress]:
        request = pb.RegisterModelRequest(name=name, path=str(path))
        return await collect(self.stub.RegisterModel(request, timeout=TIMEOUT_S))

    async def load(self, model: str) -> list[pb.LoadProgress]:
        request = pb.LoadModelRequest(model=model)
        return await collect(self.stub.LoadModel(request, timeout=TIMEOUT_S))

    async def lease(self, model: str) -> PoolLease:
        done = (await self.load(model))[-1]
        return await take_lease(done.attach_socket, model, done.digest, "worker")

    async def call(self, method: str, request: Any) -> Any:
        with gearfall_errors():
            return await getattr(self.stub, method)(request, timeout=TIMEOUT_S)

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return once it holds; looked at after every change of cluster state."""
        async with asyncio.timeout(TIMEOUT_S):
            async for _ in self.cluster.changes():
                if holds():
                    return

    async def wait_model(self, name: str, nodes: tuple[str, ...]) -> ModelRecord:
        """Return the model's record once it lists exactly these nodes."""
        models = self.cluster.view.models

        def is_listed() -> bool:
            nonlocal models
            models = self.cluster.view.models
            return name in models and models[ModelName(name)].nodes == nodes

        await self.wait_until(is_listed)
        return models[ModelName(name)]

    async def wait_node(self, **fields: object) -> NodeRecord:
        """Return this node's record once it has these values."""

        def is_published() -> bool:
            record = self.cluster.view.nodes.get(self.node_id)
            return record is not None and all(getattr(record, f) == fields[f] for f in fields)

        await self.wait_until(is_published)
        return self.cluster.view.nodes[self.node_id]


async def collect(call: Any) -> list[Any]:
    with gearfall_errors():
        return [message async for message in call]


@contextlib.contextmanager
def gearfall_errors() -> Any:
    """Raise what the servicer raised."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def no_canary(request: CanaryRequest, size_bytes: int) -> Canary:
    """What most tests compute: their models are none that transformers could run."""
    raise InvalidRequest(f"no model at {request.directory}")


@contextlib.asynccontextmanager
async def running_store(
    directory: Path,
    *,
    node: str = "node-0",
    server: MemoryStateServer | None = None,
    dram_bytes: int = 2**26,
    ssd_bytes: int = 0,
    spare_bytes: int = SPARE_BYTES,
    read: ReadChunks = read_chunks,
    compute_canary: ComputeCanary = no_canary,
) -> AsyncIterator[RunningStore]:
    """Run a store on `directory`, against its own cluster state unless a server is given."""
    state = MemoryState(server)
    cluster = Cluster(state)
    await cluster.start()
    settings = StoreSettings(
        NodeId(node),
        directory,
        directory / "attach",
        dram_bytes,
        ssd_bytes=ssd_bytes,
        spare_bytes=spare_bytes,
    )
    service = StoreService(settings, cluster, read=read, compute_canary=compute_canary)
    await service.open()
    grpc_server = await start_server(
        "127.0.0.1:0",
        lambda s: add_StoreServicer_to_server(StoreServicer(service), s),
        ("gearfall.v1.Store",),
    )
    channel = open_channel(grpc_server.address)
    try:
        await service.start(grpc_server.address)
        yield RunningStore(service, StoreStub(channel), cluster, state, settings.node_id)
    finally:
        await channel.close()
        await grpc_server.stop(0)
        await service.stop()
        await cluster.stop()
        await state.close()
