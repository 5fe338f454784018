"""The gRPC face of the worker: convert, call, convert back."""

from collections.abc import AsyncIterator

import grpc

from gearfall.infra.convert import replica_to_pb
from gearfall.infra.grpc_errors import Context
from gearfall.pb import worker_pb2 as pb
from gearfall.pb import worker_pb2_grpc
from services.worker.service import WorkerService

NO_MIGRATION = (
    "live migration is not part of this version: a job that leaves its worker resumes elsewhere "
    "from its router's token log (see Drain)"
)


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Serves `gearfall.v1.Worker`."""

    def __init__(self, service: WorkerService) -> None:
        self._service = service

    async def GetStatus(  # noqa: N802 - named by the proto
        self, _request: pb.WorkerStatusRequest, _context: Context
    ) -> pb.WorkerStatus:
        """Say what is hosted."""
        state = self._service.status()
        return pb.WorkerStatus(
            worker_id=state.record.worker_id,
            node_id=state.record.node_id,
            address=state.record.address,
            device=state.record.device,
            memory_bytes=state.record.memory_bytes,
            memory_used_bytes=state.memory_used_bytes,
            replicas=[replica_to_pb(record) for record in state.replicas],
        )

    async def Drain(  # noqa: N802 - named by the proto
        self, request: pb.DrainRequest, _context: Context
    ) -> pb.DrainReply:
        """Stop claiming and end all replicas."""
        report = await self._service.drain(request.deadline_s)
        return pb.DrainReply(
            finished_jobs=report.finished_jobs, lost_job_ids=list(report.lost_job_ids)
        )

    async def MigrateJob(  # noqa: N802 - named by the proto
        self, _request: pb.MigrateJobRequest, context: Context
    ) -> pb.MigrateJobReply:
        """Answer UNIMPLEMENTED."""
        return await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_MIGRATION)

    async def ReceiveMigration(  # noqa: N802 - named by the proto
        self, _request_iterator: AsyncIterator[pb.MigrationFrame], context: Context
    ) -> AsyncIterator[pb.MigrationReply]:
        """Answer UNIMPLEMENTED."""
        replies: tuple[pb.MigrationReply, ...] = ()
        for reply in replies:  # what makes this method a stream
            yield reply
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_MIGRATION)
