"""The TokenSink door: what workers push goes to the job table, its replies go back."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import Epoch, JobId, RouterId, WorkerId
from gearfall.infra.net.convert import token_run_from_pb
from gearfall.pb import router_pb2 as pb
from gearfall.pb import router_pb2_grpc
from services.router.jobs.job_table import JobTable
from services.router.jobs.running_job import Finished, Granted, Kept, Reply, Stop, WorkerLink

_log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_GONE = "its stream ended"

GATHER_S = 0.1
"""How long a worker's finished jobs wait to be told together: its queue entries are acknowledged so
much later, and its claims on them end, which nobody waits for."""


class Outbox:
    """Replies on their way to one worker; jobs that finished wait for each other."""

    def __init__(self, gather_s: float) -> None:
        """`gather_s`: how long."""
        self._gather_s = gather_s
        self._replies: asyncio.Queue[pb.RouterReply | None] = asyncio.Queue()
        self._finished: list[pb.JobFinished] = []

    def send(self, reply: Reply) -> None:
        """Send a reply, behind those before it that are not about finished jobs."""
        if not isinstance(reply, Finished):
            self._replies.put_nowait(reply_to_pb(reply))
            return
        self._finished.append(pb.JobFinished(job_id=reply.job_id, epoch=reply.epoch))
        if len(self._finished) == 1:
            asyncio.get_running_loop().call_later(self._gather_s, self._tell_finished)

    def put(self, reply: pb.RouterReply) -> None:
        """Send a message as it is."""
        self._replies.put_nowait(reply)

    def end(self) -> None:
        """End the stream when all is sent."""
        self._tell_finished()
        self._replies.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[pb.RouterReply]:
        """Yield what is to be sent, up to the end."""
        while (reply := await self._replies.get()) is not None:
            yield reply

    def _tell_finished(self) -> None:
        if self._finished:
            jobs = pb.JobsFinished(jobs=self._finished)
            self._replies.put_nowait(pb.RouterReply(finished=jobs))
            self._finished = []


class TokenSinkServicer(router_pb2_grpc.TokenSinkServicer):
    """One Push stream per worker; its end, however it comes, costs the worker its jobs here."""

    def __init__(self, jobs: JobTable, router_id: RouterId, *, gather_s: float = GATHER_S) -> None:
        """`gather_s`: how long finished jobs wait to be told together."""
        self._jobs = jobs
        self._router_id = router_id
        self._gather_s = gather_s

    async def Push(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[pb.WorkerPush], context: Context
    ) -> AsyncIterator[pb.RouterReply]:
        """Take pushes in the order they come; InvalidRequest unless the first is hello."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("push") != "hello" or not first.hello.worker_id:
            raise InvalidRequest("a push stream starts with hello", param="hello")
        outbox = Outbox(self._gather_s)
        link = WorkerLink(WorkerId(first.hello.worker_id), outbox.send, outbox.end)
        # The call may be cancelled while this generator is suspended: the callback does not wait
        # for it to be collected.
        context.add_done_callback(lambda _: self._jobs.close_link(link, _GONE))  # type: ignore[arg-type]
        outbox.put(pb.RouterReply(hello=pb.RouterHello(router_id=self._router_id)))
        self._jobs.open_link(link)
        _log.info("worker connected", extra={"worker": link.worker_id})
        reader = asyncio.create_task(self._read(request_iterator, link), name="push-reader")
        reader.add_done_callback(lambda _: outbox.end())
        try:
            async for reply in outbox:
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
                    for claim in push.step.claims:
                        self._claim(link, claim)
                    for run in push.step.runs:
                        self._jobs.take_run(link, token_run_from_pb(run))
                case "claim":
                    self._claim(link, push.claim)
                case "lost":
                    lost = push.lost
                    self._jobs.take_lost(link, JobId(lost.job_id), Epoch(lost.epoch), lost.reason)
                case "handover":
                    self._hand_over(link, push.handover)
                case other:
                    raise InvalidRequest(f"unexpected push: {other}", param="push")

    def _claim(self, link: WorkerLink, claim: pb.JobClaim) -> None:
        self._jobs.claim(link, JobId(claim.job_id), Epoch(claim.epoch), held_s=claim.held_s)

    def _hand_over(self, link: WorkerLink, handover: pb.JobHandover) -> None:
        self._jobs.hand_over(
            link,
            JobId(handover.job_id),
            Epoch(handover.epoch),
            handover.next_index,
            WorkerId(handover.target_worker_id),
        )


def reply_to_pb(reply: Stop | Granted | Kept) -> pb.RouterReply:
    """Return the message for a reply to a worker."""
    match reply:
        case Stop(job_id, epoch, reason, handed_over):
            stop = pb.JobStop(job_id=job_id, epoch=epoch, reason=reason, handed_over=handed_over)
            return pb.RouterReply(stop=stop)
        case Granted(job_id, epoch, next_index):
            granted = pb.JobGranted(job_id=job_id, epoch=epoch, next_index=next_index)
            return pb.RouterReply(granted=granted)
        case Kept(job_id, epoch, reason):
            return pb.RouterReply(kept=pb.JobKept(job_id=job_id, epoch=epoch, reason=reason))
