"""One worker's long-lived stream of tokens to one router, reconnected for as long as it is needed.

    connecting --hello answered--> open --break--> connecting ... --too long--> abandoned

The listener hears of every step. What is sent while the stream is not open is dropped: its
listener sends the claims again when it is told that the stream is open.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import grpc

from gearfall.core.generation.job import Job, TokenRun
from gearfall.core.ids import Epoch, JobId, NodeId, RouterId, WorkerId
from gearfall.infra.net.bearer import bearer_metadata
from gearfall.infra.net.convert import token_run_to_pb
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.pb import common_pb2 as pb_common
from gearfall.pb import router_pb2 as pb
from gearfall.pb.router_pb2_grpc import TokenSinkStub

RECONNECT_FOR_S = 10.0
HELLO_TIMEOUT_S = 3.0
FLUSH_TIMEOUT_S = 1.0
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
_JOINABLE = frozenset(
    {
        pb_common.FINISH_REASON_UNSPECIFIED,
        pb_common.FINISH_REASON_STOP,
        pb_common.FINISH_REASON_LENGTH,
    }
)
"""Ends that count the run's tokens in; after others the tokens before them stay a run."""
CLAIM_WAIT_S = 0.005
"""How long the claim of a job whose tokens may wait for each other waits for them: a small model's
whole answer is there by then, and the router hears of both at once."""
MOST_JOINED = 32
"""Steps that one message may hold: it stays far below the limit of a message."""

_log = logging.getLogger(__name__)

Call = grpc.aio.StreamStreamCall[pb.WorkerPush, pb.RouterReply]


class PushListener(Protocol):
    """Hears what happens on push streams."""

    def stream_opened(self, address: str, router_id: RouterId) -> None:
        """The router answered hello."""
        ...

    def stream_broke(self, address: str) -> bool:
        """An open stream ended; return whether it is still needed."""
        ...

    def stream_abandoned(self, address: str) -> None:
        """No reconnection came about in time; the stream is over."""
        ...

    def job_stopped(
        self, job_id: JobId, epoch: Epoch, reason: str, *, handed_over: bool = False
    ) -> None:
        """The router wants no more of (job, epoch); `handed_over`: the target is the owner now."""
        ...

    def job_granted(self, address: str, job_id: JobId, epoch: Epoch) -> None:
        """This worker is the owner of (job, epoch), which it held."""
        ...

    def job_kept(self, job_id: JobId, epoch: Epoch, reason: str) -> None:
        """The handover of (job, epoch) did not come about: this worker is the owner as before."""
        ...

    def job_finished(self, job_id: JobId, epoch: Epoch) -> None:
        """The router has the final run of (job, epoch)."""
        ...


class PushStream:
    """Owner of the stream to the router at one address."""

    def __init__(
        self,
        address: str,
        worker_id: WorkerId,
        node_id: NodeId,
        listener: PushListener,
        *,
        reconnect_for_s: float = RECONNECT_FOR_S,
        connect: Callable[[str], grpc.aio.Channel] = open_channel,
        secret: str = "",
    ) -> None:
        """`secret`: the cluster's; empty where its routers ask for none."""
        self.address = address
        self.router_id: RouterId | None = None
        """Of the router at the other end while the stream is open."""
        self._hello = pb.WorkerPush(hello=pb.WorkerHello(worker_id=worker_id, node_id=node_id))
        self._listener = listener
        self._reconnect_for_s = reconnect_for_s
        self._connect = connect
        self._metadata = bearer_metadata(secret)
        self._outgoing: asyncio.Queue[pb.WorkerPush] = asyncio.Queue()
        self._claims: list[tuple[pb.JobClaim, float]] = []
        """That wait for tokens, and since when."""
        self._claims_due: asyncio.TimerHandle | None = None
        self._call: Call | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect in the background."""
        self._task = asyncio.create_task(self._run(), name=f"push-{self.address}")

    async def stop(self) -> None:
        """Send what is queued, briefly, and end without telling the listener. Idempotent."""
        if self.router_id is not None:
            self._send_claims()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_TIMEOUT_S):
                    await self._outgoing.join()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def reconnect(self) -> None:
        """Break the stream now, so that a new hello says who is at the other end."""
        if self._call is not None:
            self._call.cancel()

    def send_claim(self, job: Job) -> None:
        """Tell the router that this worker has (job, epoch), with its first tokens if they can wait
        and come soon."""
        if self.router_id is None:
            return
        claim = pb.JobClaim(job_id=job.job_id, epoch=job.epoch, model=job.model)
        self._claims.append((claim, time.perf_counter()))
        if job.gather_s < CLAIM_WAIT_S:
            self._send_claims()
        elif self._claims_due is None:
            loop = asyncio.get_running_loop()
            self._claims_due = loop.call_later(CLAIM_WAIT_S, self._send_claims)

    def send_step(self, runs: Sequence[TokenRun]) -> None:
        """Push all tokens of one decode step that belong to this router, in one message at most."""
        step = pb.StepTokens(claims=self._take_claims(), runs=map(token_run_to_pb, runs))
        self._send(pb.WorkerPush(step=step))

    def send_lost(self, job_id: JobId, epoch: Epoch, reason: str) -> None:
        """Tell the router that (job, epoch) does not run here, or no longer."""
        lost = pb.JobLost(job_id=job_id, epoch=epoch, reason=reason)
        self._send(pb.WorkerPush(lost=lost))

    def send_handover(self, job: Job, next_index: int, target_id: WorkerId) -> None:
        """Ask the router to make the target the owner, behind everything that was sent."""
        handover = pb.JobHandover(
            job_id=job.job_id, epoch=job.epoch, next_index=next_index, target_worker_id=target_id
        )
        self._send(pb.WorkerPush(handover=handover))

    def _send(self, push: pb.WorkerPush) -> None:
        if self.router_id is not None:
            self._send_claims()
            self._outgoing.put_nowait(push)

    def _send_claims(self) -> None:
        for claim in self._take_claims():
            self._outgoing.put_nowait(pb.WorkerPush(claim=claim))

    def _take_claims(self) -> list[pb.JobClaim]:
        """Return the claims that wait, which are sent now."""
        if self._claims_due is not None:
            self._claims_due.cancel()
            self._claims_due = None
        waited, self._claims = self._claims, []
        now_s = time.perf_counter()
        for claim, since_s in waited:
            claim.held_s = now_s - since_s
        return [claim for claim, _ in waited]

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._reconnect_for_s
        pause_s = FIRST_PAUSE_S
        while True:
            if await self._connect_once():
                if not self._listener.stream_broke(self.address):
                    break
                give_up_s = loop.time() + self._reconnect_for_s
                pause_s = FIRST_PAUSE_S
            if loop.time() + pause_s >= give_up_s:
                break
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._listener.stream_abandoned(self.address)

    async def _connect_once(self) -> bool:
        """Hold one connection until it breaks; return whether it was ever open."""
        self._outgoing = asyncio.Queue()
        self._take_claims()  # of the stream that broke
        async with self._connect(self.address) as channel:
            self._call = TokenSinkStub(channel).Push(metadata=self._metadata)
            try:
                router_id = await self._greet(self._call)
                if router_id is None:
                    return False
                self.router_id = router_id
                _log.info("push stream open", extra={"router": router_id})
                self._listener.stream_opened(self.address, router_id)
                await self._serve(self._call)
                return True
            finally:
                self.router_id = None
                self._call.cancel()
                self._call = None

    async def _greet(self, call: Call) -> RouterId | None:
        """Return who answers hello, None when nobody does."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await call.write(self._hello)
                reply = await call.read()
        except (grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError) as error:
            level = logging.WARNING if _is_refused(error) else logging.DEBUG
            _log.log(level, "no hello", extra={"address": self.address, "error": str(error)})
            return None
        except asyncio.CancelledError:
            if _is_cancelled_from_outside():
                raise
            return None
        if not isinstance(reply, pb.RouterReply) or reply.WhichOneof("reply") != "hello":
            return None
        return RouterId(reply.hello.router_id)

    async def _serve(self, call: Call) -> None:
        """Read and write until either ends."""
        tasks = {asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                _log_end(self.address, task)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, call: Call) -> None:
        while isinstance(reply := await call.read(), pb.RouterReply):
            match reply.WhichOneof("reply"):
                case "stop":
                    stop = reply.stop
                    self._listener.job_stopped(
                        JobId(stop.job_id),
                        Epoch(stop.epoch),
                        stop.reason,
                        handed_over=stop.handed_over,
                    )
                case "finished":
                    for finished in reply.finished.jobs:
                        self._listener.job_finished(JobId(finished.job_id), Epoch(finished.epoch))
                case "granted":
                    job_id, epoch = JobId(reply.granted.job_id), Epoch(reply.granted.epoch)
                    self._listener.job_granted(self.address, job_id, epoch)
                case "kept":
                    kept = reply.kept
                    self._listener.job_kept(JobId(kept.job_id), Epoch(kept.epoch), kept.reason)
                case _:
                    pass

    async def _write(self, call: Call) -> None:
        while True:
            pushes = [await self._outgoing.get()]
            while not self._outgoing.empty() and len(pushes) < MOST_JOINED:
                pushes.append(self._outgoing.get_nowait())
            for push in join_steps(pushes):
                await call.write(push)
            for _ in pushes:
                self._outgoing.task_done()


def join_steps(pushes: Sequence[pb.WorkerPush]) -> list[pb.WorkerPush]:
    """Return the same in the same order, with steps that follow each other in one message.

    A stream that is behind its engine then costs the router one message and not one per step.
    """
    joined: list[pb.WorkerPush] = []
    for push in pushes:
        if push.HasField("step") and joined and joined[-1].HasField("step"):
            _extend(joined[-1].step, push.step)
        else:
            joined.append(push)
    return joined


def _extend(step: pb.StepTokens, later: pb.StepTokens) -> None:
    """Append claims and runs of a later step; a run that continues its job's becomes part of it."""
    step.claims.extend(later.claims)
    last_by_job = {(run.job_id, run.epoch): run for run in step.runs}
    for run in later.runs:
        last = last_by_job.get((run.job_id, run.epoch))
        if last is None or not _continues(last, run):
            step.runs.append(run)
            continue
        last.token_ids.extend(run.token_ids)
        last.logprobs.extend(run.logprobs)
        last.margins.extend(run.margins)
        last.alternatives.extend(run.alternatives)
        last.finish = run.finish
        last.error = run.error
        last.device_s += run.device_s
        last.draft_tokens += run.draft_tokens
        last.accepted_draft_tokens += run.accepted_draft_tokens


def _continues(last: pb_common.TokenRun, run: pb_common.TokenRun) -> bool:
    """Whether both can be one run: no gap, no end between, alternatives for all tokens or none."""
    if last.finish or not run.token_ids or run.finish not in _JOINABLE:
        return False
    has_alternatives = bool(last.alternatives) == bool(run.alternatives)
    return has_alternatives and last.index + len(last.token_ids) == run.index


def _is_refused(error: BaseException) -> bool:
    """Whether the router does not know this cluster's secret: somebody has to set it."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    return error.code() is grpc.StatusCode.UNAUTHENTICATED


def _is_cancelled_from_outside() -> bool:
    """Tell this task's own cancellation from that of a call that was cancelled beneath it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _log_end(address: str, task: "asyncio.Task[None]") -> None:
    error = None if task.cancelled() else task.exception()
    if error is None or isinstance(error, (grpc.aio.AioRpcError, asyncio.InvalidStateError)):
        reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
        _log.info("push stream ended", extra={"address": address, "reason": str(reason or "")})
    else:
        _log.error("push stream failed", extra={"address": address}, exc_info=error)
