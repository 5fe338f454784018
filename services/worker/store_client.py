"""The store of the worker's own node over gRPC."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from gearfall.core.errors import DeadlineExceeded, Internal, Unavailable
from gearfall.core.ids import ModelName
from gearfall.infra.net.convert import timeline_from_pb
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_errors import error_from_rpc
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


@dataclass(slots=True, eq=False)
class _Connection:
    address: str
    channel: grpc.aio.Channel
    users: int = 0


class GrpcStoreClient:
    """Implements `StoreClient`; looks the store's address up for each call, as it may move.

    One connection stays open, so that no start waits for it, until a call over it fails. One that
    finds no store is replaced: it would fail calls until it looks again, the store there or not.
    """

    def __init__(self, find_address: Callable[[], str | None]) -> None:
        """`find_address`: host:port of the node's live store, None when there is none."""
        self._find_address = find_address
        self._connection: _Connection | None = None

    async def connect(self) -> None:
        """Begin to connect, so that the first start finds it done; nothing without a store."""
        address = self._find_address()
        if address is not None:
            (await self._connect(address)).channel.get_state(try_to_connect=True)

    async def close(self) -> None:
        """Disconnect once the calls under way have ended. Idempotent."""
        left, self._connection = self._connection, None
        if left is not None and not left.users:
            await left.channel.close()

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
        used = await self._connect(address)
        used.users += 1
        try:
            stub: StoreAsyncStub = StoreStub(used.channel)
            yield stub
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and used is self._connection:
                # One that lost its store would wait before it looks for it again.
                self._connection = None
            raise error_from_rpc(error) from error
        finally:
            used.users -= 1
            if not used.users and used is not self._connection:
                await used.channel.close()

    async def _connect(self, address: str) -> _Connection:
        if (kept := self._connection) is not None and (
            kept.address != address
            or kept.channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE
        ):
            await self.close()
        if self._connection is None:
            self._connection = _Connection(address, open_channel(address))
        return self._connection


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
