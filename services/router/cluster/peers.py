"""Calls from the router to stores, workers and the scheduler, over channels that are kept open."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from gearfall.core.errors import GearfallError, NotFound, Unavailable
from gearfall.core.records import ModelRecord, NodeRecord
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_errors import error_from_rpc
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.pb import (
    scheduler_pb2,
    scheduler_pb2_grpc,
    store_pb2,
    store_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

Status = TypeVar("Status")

_FILE_S = 10.0
_STATUS_S = 2.0
_DELETE_S = 30.0
_REGISTER_S = 3600.0


class Peers:
    """Stores, workers and the scheduler as the view names them. Errors are of the gearfall tree."""

    def __init__(self, view: Callable[[], ClusterView]) -> None:
        self._view = view
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def read_file(self, model: ModelRecord, file: str) -> bytes:
        """Return a checkpoint's small file from the first live store that has it.

        Raises NotFound when the stores say there is no such file, Unavailable when none answers.
        """
        request = store_pb2.ReadFileRequest(model=model.name, file=file)
        errors: list[GearfallError] = []
        for node in self._nodes_of(model):
            try:
                reply = await self._store(node).ReadFile(request, timeout=_FILE_S)
            except grpc.aio.AioRpcError as error:
                errors.append(error_from_rpc(error))
                continue
            return reply.content
        if errors and all(isinstance(each, NotFound) for each in errors):
            raise errors[0]
        reason = errors[0].message if errors else "no store that has it is up"
        raise Unavailable(f"can't read {file} of {model.name}: {reason}", retry_after_s=1.0)

    async def register_model(
        self, node: NodeRecord, request: store_pb2.RegisterModelRequest
    ) -> AsyncIterator[store_pb2.RegisterProgress]:
        """Register a model directory with one store and yield its progress."""
        try:
            async for progress in self._store(node).RegisterModel(request, timeout=_REGISTER_S):
                yield progress
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def delete_model(self, node: NodeRecord, name: str) -> None:
        """Remove a model from one store; one that does not have it is fine."""
        request = store_pb2.DeleteModelRequest(model=name)
        try:
            await self._store(node).DeleteModel(request, timeout=_DELETE_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise error_from_rpc(error) from error

    async def store_statuses(self) -> list[store_pb2.StoreStatus | str]:
        """Return the status of each store, or in words why it could not be had."""
        request = store_pb2.StoreStatusRequest()
        return await asyncio.gather(
            *(
                _status(f"store {node.node_id}", self._store(node).GetStatus, request)
                for node in self._view().nodes.values()
            )
        )

    async def worker_statuses(self) -> list[worker_pb2.WorkerStatus | str]:
        """Return the status of each worker, or in words why it could not be had."""
        request = worker_pb2.WorkerStatusRequest()
        return await asyncio.gather(
            *(
                _status(
                    f"worker {each.worker_id}",
                    worker_pb2_grpc.WorkerStub(self._channel(each.address)).GetStatus,
                    request,
                )
                for each in self._view().workers.values()
            )
        )

    async def explain_model(self, model: str) -> scheduler_pb2.ExplainReply:
        """Ask the leading scheduler why a model is where it is; Unavailable when none leads."""
        leader = self._view().leader
        if leader is None:
            raise Unavailable("no scheduler leads", retry_after_s=2.0)
        stub = scheduler_pb2_grpc.SchedulerStub(self._channel(leader.address))
        request = scheduler_pb2.ExplainRequest(model=model)
        try:
            return await stub.Explain(request, timeout=_STATUS_S)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def close(self) -> None:
        """Close every channel."""
        await asyncio.gather(*(each.close() for each in self._channels.values()))
        self._channels.clear()

    def _nodes_of(self, model: ModelRecord) -> list[NodeRecord]:
        return [node for node in self._view().nodes.values() if node.node_id in model.nodes]

    def _store(self, node: NodeRecord) -> "store_pb2_grpc.StoreAsyncStub":
        return store_pb2_grpc.StoreStub(self._channel(node.address))

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]


async def _status(
    who: str, call: Callable[..., Awaitable[Status]], request: Message
) -> Status | str:
    try:
        return await call(request, timeout=_STATUS_S)
    except grpc.aio.AioRpcError as error:
        return f"{who}: {error_from_rpc(error).message}"
