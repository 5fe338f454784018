"""The store of the worker's own node over gRPC."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from gearfall.core.errors import DeadlineExceeded, Internal, Unavailable
from gearfall.core.ids import ModelName
from gearfall.infra.convert import timeline_from_pb
from gearfall.infra.grpc_channels import open_channel
from gearfall.infra.grpc_errors import error_from_rpc
from gearfall.pb import store_pb2 as pb
from gearfall.pb.store_pb2_grpc import StoreStub
from services.worker.ports import LeasableModel, LoadedModel, OnLeasable

if TYPE_CHECKING:
    from gearfall.pb.store_pb2_grpc import StoreAsyncStub

FILE_TIMEOUT_S = 600.0
"""Longest wait for a small file of a model that is on its way from another node."""
CANARY_TIMEOUT_S = 600.0
"""Longest wait for a canary that is being computed."""
PROGRESS_TIMEOUT_S = 60.0
"""Longest a load may say nothing: a load's length is unknown, its silence is not."""


@dataclass(slots=True)
class _SharedChannel:
    channel: grpc.aio.Channel
    users: int = 0


class GrpcStoreClient:
    """Implements `StoreClient`; looks the store's address up for each call, as it may move."""

    def __init__(self, find_address: Callable[[], str | None]) -> None:
        """`find_address`: host:port of the node's live store, None when there is none."""
        self._find_address = find_address
        self._channels: dict[str, _SharedChannel] = {}

    async def load_model(
        self,
        model: ModelName,
        on_leasable: OnLeasable = lambda _: None,
        *,
        wanted_unix_s: float = 0.0,
        on_begun: Callable[[], None] = lambda: None,
    ) -> LoadedModel:
        """See the port."""
        async with self._stub() as stub:
            call = stub.LoadModel(pb.LoadModelRequest(model=model, wanted_unix_s=wanted_unix_s))
            try:
                progress = await _next_progress(call, model)
                on_begun()
                while not progress.done:
                    if progress.attach_socket:
                        on_leasable(LeasableModel(progress.digest, progress.attach_socket))
                    progress = await _next_progress(call, model)
                return LoadedModel(
                    digest=progress.digest,
                    attach_socket=progress.attach_socket,
                    timeline=timeline_from_pb(progress.timeline),
                )
            finally:
                call.cancel()

    async def read_file(self, model: ModelName, file: str) -> bytes:
        """See the port."""
        async with self._stub() as stub:
            request = pb.ReadFileRequest(model=model, file=file)
            reply = await stub.ReadFile(request, timeout=FILE_TIMEOUT_S)
            return reply.content

    async def read_canary(self, model: ModelName) -> bytes:
        """See the port."""
        async with self._stub() as stub:
            request = pb.ReadCanaryRequest(model=model)
            reply = await stub.ReadCanary(request, timeout=CANARY_TIMEOUT_S)
            return reply.content

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator["StoreAsyncStub"]:
        address = self._find_address()
        if address is None:
            raise Unavailable("the store of this node is not there")
        try:
            async with self._channel_to(address) as channel:
                stub: StoreAsyncStub = StoreStub(channel)
                yield stub
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    @asynccontextmanager
    async def _channel_to(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """Share one channel among calls that run at the same time, as those of one start do."""
        shared = self._channels.get(address)
        if shared is None:
            shared = self._channels[address] = _SharedChannel(open_channel(address))
        shared.users += 1
        try:
            yield shared.channel
        finally:
            shared.users -= 1
            if shared.users == 0:
                del self._channels[address]
                await shared.channel.close()


async def _next_progress(
    call: grpc.aio.UnaryStreamCall[pb.LoadModelRequest, pb.LoadProgress], model: ModelName
) -> pb.LoadProgress:
    try:
        async with asyncio.timeout(PROGRESS_TIMEOUT_S):
            progress = await call.read()
    except TimeoutError:
        raise DeadlineExceeded(f"the load of {model} made no progress") from None
    if not isinstance(progress, pb.LoadProgress):
        raise Internal(f"the load of {model} ended without a result")
    return progress
