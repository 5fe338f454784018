"""The gRPC face of the worker: convert, call, convert back."""

from collections.abc import AsyncIterator

from gearfall.core.ids import Epoch, JobId
from gearfall.infra.net.convert import priority_to_pb, replica_to_pb
from gearfall.infra.net.grpc_errors import Context
from gearfall.pb import worker_pb2 as pb
from gearfall.pb import worker_pb2_grpc
from services.worker.host import DrainReport
from services.worker.jobs.claims import Claim
from services.worker.migration.call import Moved
from services.worker.migration.cost import DataPath
from services.worker.migration.desk import MigrationDesk
from services.worker.migration.evacuation import Departure
from services.worker.service import WorkerService

_PATHS = {
    DataPath.TOKENS: pb.MIGRATION_PATH_TOKENS,
    DataPath.KV: pb.MIGRATION_PATH_KV,
    DataPath.KV_STREAM: pb.MIGRATION_PATH_KV_STREAM,
}
_PATHS_FROM_PB = {number: path for path, number in _PATHS.items()}


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Serves `gearfall.v1.Worker`."""

    def __init__(self, service: WorkerService, desk: MigrationDesk) -> None:
        self._service = service
        self._desk = desk

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
            jobs=[_claim_to_pb(claim) for claim in self._desk.running()],
            max_replicas=state.record.max_replicas,
        )

    async def Drain(  # noqa: N802 - named by the proto
        self, request: pb.DrainRequest, _context: Context
    ) -> pb.DrainReply:
        """Stop claiming, move or finish what runs, end all replicas."""
        return drain_reply_to_pb(await self._service.drain(request.deadline_s))

    async def MigrateJob(  # noqa: N802 - named by the proto
        self, request: pb.MigrateJobRequest, _context: Context
    ) -> pb.MigrateJobReply:
        """Move a running job to another worker."""
        moved = await self._desk.move(
            JobId(request.job_id),
            Epoch(request.epoch),
            request.target_address,
            path=_PATHS_FROM_PB.get(request.path),
        )
        return moved_to_pb(moved)

    async def ReceiveMigration(  # noqa: N802 - named by the proto
        self, request_iterator: AsyncIterator[pb.MigrationFrame], _context: Context
    ) -> AsyncIterator[pb.MigrationReply]:
        """Take in a job that another worker moves here."""
        async for reply in self._desk.receive(request_iterator):
            yield reply


def drain_reply_to_pb(report: DrainReport) -> pb.DrainReply:
    """Return the message for what came of a drain."""
    return pb.DrainReply(
        migrated_jobs=report.migrated_jobs,
        finished_jobs=report.finished_jobs,
        lost_job_ids=list(report.lost_job_ids),
        migrations=[_departure_to_pb(each) for each in report.departures],
    )


def _claim_to_pb(claim: Claim) -> pb.RunningJob:
    job = claim.job
    return pb.RunningJob(
        job_id=job.job_id,
        request_id=job.request_id,
        model=job.model,
        epoch=job.epoch,
        prompt_tokens=len(job.prompt_token_ids),
        next_index=claim.next_index,
        priority=priority_to_pb(job.priority),
    )


def _departure_to_pb(departure: Departure) -> pb.MigrationReport:
    return pb.MigrationReport(
        job_id=departure.job_id,
        target_worker_id=departure.target_id,
        error=departure.error,
        reply=moved_to_pb(departure.moved) if departure.moved else None,
    )


def moved_to_pb(moved: Moved) -> pb.MigrateJobReply:
    """Return the message for a migration that came about."""
    return pb.MigrateJobReply(
        epoch=moved.epoch,
        rounds=moved.rounds,
        moved_bytes=moved.moved_bytes,
        pause_s=moved.pause_s,
        path=_PATHS[moved.path],
        predicted_s=moved.predicted_s,
        duration_s=moved.duration_s,
        predicted_other_s=moved.predicted_other_s,
        tokens=moved.tokens,
    )
