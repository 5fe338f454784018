"""What may be asked of one worker from outside: its jobs, a drain, a migration."""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc
from google.protobuf.message import Message

from gearfall.core.ids import JobId
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_errors import error_from_rpc
from gearfall.pb import worker_pb2 as pb
from gearfall.pb.worker_pb2_grpc import WorkerStub

if TYPE_CHECKING:
    from gearfall.pb.worker_pb2_grpc import WorkerAsyncStub

STATUS_S = 5.0
MOVE_S = 120.0
GRACE_S = 15.0
"""Beyond a drain's own deadline: to hand back what is left and to stop the engines."""

Reply = TypeVar("Reply")


class WorkerDoor:
    """A connection to one worker; `async with` closes it. Errors are of the gearfall tree."""

    def __init__(self, address: str) -> None:
        """`address`: host:port of the worker's gRPC service."""
        self.address = address
        self._channel = open_channel(address)
        self._stub: WorkerAsyncStub = WorkerStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def status(self) -> pb.WorkerStatus:
        """Return what it hosts and which jobs it owns. Raises Unavailable when it is not there."""
        return await self._ask(self._stub.GetStatus, pb.WorkerStatusRequest(), STATUS_S)

    async def drain(self, deadline_s: float) -> pb.DrainReply:
        """Have it take nothing more and move, finish or hand back what runs, within so long."""
        request = pb.DrainRequest(deadline_s=deadline_s)
        return await self._ask(self._stub.Drain, request, deadline_s + GRACE_S)

    async def move(
        self,
        job_id: JobId,
        target_address: str,
        path: "pb.MigrationPath.ValueType" = pb.MIGRATION_PATH_UNSPECIFIED,
    ) -> pb.MigrateJobReply:
        """Move a job that it owns to the worker at `target_address`.

        Raises NotFound when it does not run there, Unavailable when it stays where it is.
        """
        request = pb.MigrateJobRequest(job_id=job_id, target_address=target_address, path=path)
        return await self._ask(self._stub.MigrateJob, request, MOVE_S)

    async def _ask(
        self, method: Callable[..., Awaitable[Reply]], request: Message, timeout_s: float
    ) -> Reply:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
