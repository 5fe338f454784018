"""The TokenSink door: what workers push goes to the job table, its replies go back."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import Epoch, JobId, RouterId, WorkerId
from gearfall.infra.convert import token_run_from_pb
from gearfall.pb import router_pb2 as pb
from gearfall.pb import router_pb2_grpc
from services.router.jobs import JobTable
from services.router.running_job import Finished, Granted, Kept, Reply, Stop, WorkerLink

_log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_END = None
_GONE = "its stream ended"


class TokenSinkServicer(router_pb2_grpc.TokenSinkServicer):
    """One Push stream per worker; its end, however it comes, costs the worker its jobs here."""

    def __init__(self, jobs: JobTable, router_id: RouterId) -> None:
        self._jobs = jobs
        self._router_id = router_id

    async def Push(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[pb.WorkerPush], context: Context
    ) -> AsyncIterator[pb.RouterReply]:
        """Take pushes in the order they come; InvalidRequest unless the first is hello."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("push") != "hello" or not first.hello.worker_id:
            raise InvalidRequest("a push stream starts with hello", param="hello")
        outbox: asyncio.Queue[pb.RouterReply | None] = asyncio.Queue()
        link = WorkerLink(
            WorkerId(first.hello.worker_id),
            send=lambda reply: outbox.put_nowait(reply_to_pb(reply)),
            end=lambda: outbox.put_nowait(_END),
        )
        # The call may be cancelled while this generator is suspended: the callback does not wait
        # for it to be collected.
        context.add_done_callback(lambda _: self._jobs.close_link(link, _GONE))  # type: ignore[arg-type]
        outbox.put_nowait(pb.RouterReply(hello=pb.RouterHello(router_id=self._router_id)))
        self._jobs.open_link(link)
        _log.info("worker connected", extra={"worker": link.worker_id})
        reader = asyncio.create_task(self._read(request_iterator, link), name="push-reader")
        reader.add_done_callback(lambda _: outbox.put_nowait(_END))
        try:
            while (reply := await outbox.get()) is not _END:
                yield reply
        finally:
            reader.cancel()
            self._jobs.close_link(link, _GONE)
        if reader.done() and not reader.cancelled() and (error := reader.exception()):
            raise error

    async def _read(self, pushes: AsyncIterator[pb.WorkerPush], link: WorkerLink) -> None:
        async for push in pushes:
            match push.WhichOneof("push"):
                case "step":
                    for run in push.step.runs:
                        self._jobs.take_run(link, token_run_from_pb(run))
                case "claim":
                    claim = push.claim
                    self._jobs.claim(link, JobId(claim.job_id), Epoch(claim.epoch))
                case "lost":
                    lost = push.lost
                    self._jobs.take_lost(link, JobId(lost.job_id), Epoch(lost.epoch), lost.reason)
                case "handover":
                    self._hand_over(link, push.handover)
                case other:
                    raise InvalidRequest(f"unexpected push: {other}", param="push")

    def _hand_over(self, link: WorkerLink, handover: pb.JobHandover) -> None:
        self._jobs.hand_over(
            link,
            JobId(handover.job_id),
            Epoch(handover.epoch),
            handover.next_index,
            WorkerId(handover.target_worker_id),
        )


def reply_to_pb(reply: Reply) -> pb.RouterReply:
    """Return the message for a reply to a worker."""
    match reply:
        case Stop(job_id, epoch, reason, handed_over):
            stop = pb.JobStop(job_id=job_id, epoch=epoch, reason=reason, handed_over=handed_over)
            return pb.RouterReply(stop=stop)
        case Finished(job_id, epoch):
            return pb.RouterReply(finished=pb.JobFinished(job_id=job_id, epoch=epoch))
        case Granted(job_id, epoch, next_index):
            granted = pb.JobGranted(job_id=job_id, epoch=epoch, next_index=next_index)
            return pb.RouterReply(granted=granted)
        case Kept(job_id, epoch, reason):
            return pb.RouterReply(kept=pb.JobKept(job_id=job_id, epoch=epoch, reason=reason))
