"""The source's side of a migration over gRPC: one ReceiveMigration call to the target."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import grpc

from gearfall.core.errors import Unavailable
from gearfall.core.ids import Epoch, JobId, WorkerId
from gearfall.infra.net.convert import job_to_pb
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.pb import worker_pb2 as pb
from gearfall.pb.worker_pb2_grpc import WorkerStub
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.jobs.claims import ClaimKey
from services.worker.jobs.job_board import JobBoard
from services.worker.migration.cost import DataPath
from services.worker.migration.events import (
    Accepted,
    Expired,
    Progress,
    Ready,
    Refused,
    TargetLost,
)
from services.worker.migration.kv_carriers import Connect, SocketCarrier, StreamCarrier
from services.worker.migration.kv_groups import kv_shape
from services.worker.migration.kv_sender import KvSender, Link
from services.worker.migration.source import MigrationSource
from services.worker.migration.terms import Terms

RESUME_LIMIT_S = 5.0
"""How long the source waits to hear that the target goes on; the job is not its own by then."""
CLOSE_LIMIT_S = 1.0
BULK_GAP_TOKENS = 16
"""The bulk is there when the target lacks at most so many tokens; at the latest with the freeze."""

_log = logging.getLogger(__name__)

Call = grpc.aio.StreamStreamCall[pb.MigrationFrame, pb.MigrationReply]


@dataclass(frozen=True, slots=True)
class Moved:
    """A migration that came about, as its source saw it."""

    job_id: JobId
    epoch: Epoch
    """Of the new owner."""
    target_id: WorkerId
    path: DataPath
    rounds: int
    moved_bytes: int
    """Of keys and values."""
    tokens: int
    """Of prompt and answer when it was frozen."""
    pause_s: float
    """From the source's last token to the target's first; 0 when that was not heard of."""
    duration_s: float
    """From the offer to the target's first token; 0 when that was not heard of."""
    bulk_s: float = 0.0
    """Of `duration_s`: from the target's acceptance until it lacked only a little."""
    predicted_s: float = 0.0
    """What `duration_s` was expected to be; 0 while nothing was measured."""
    predicted_other_s: float = 0.0
    """What it was expected to be by the other path."""


class MigrationCall:
    """One job on its way. Implements `SourceWire`."""

    def __init__(
        self,
        board: JobBoard,
        key: ClaimKey,
        target_address: str,
        terms: Terms,
        memory: KvMemory | None = None,
        *,
        is_streamed: bool = False,
        within_s: float = 0.0,
    ) -> None:
        """`memory`: the engine's, if the job is to be moved by its keys and values.

        `is_streamed`: they go over gRPC, and the socket is not tried. `within_s`: it has no more
        time than this; 0: it has.

        Raises NotFound or Conflict when the job can't be moved.
        """
        self._loop = asyncio.get_running_loop()
        self._address = target_address
        self._by_kv = by_kv = memory is not None
        self._frames: asyncio.Queue[pb.MigrationFrame | None] = asyncio.Queue()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._resumed: asyncio.Future[float | None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._accepted_s = self._bulk_end_s = self._frozen_s = 0.0
        self._memory = memory
        self._terms = terms
        self._is_streamed = is_streamed
        self._within_s = within_s
        self._sender: KvSender | None = None
        self._source = MigrationSource(board, key, self, terms, by_kv=by_kv)

    async def run(self, digest: str, arithmetic: str) -> Moved:
        """Move the job; `digest` names its model, `arithmetic` how its engine multiplies.

        Raises Unavailable when it stays here.
        """
        started_s = time.perf_counter()
        offer = pb.MigrationOffer(
            job=job_to_pb(self._source.offer),
            model_digest=digest,
            by_kv=self._by_kv,
            within_s=self._within_s,
            kv_shape=None if self._memory is None else kv_shape(self._memory.layout),
            arithmetic=arithmetic,
        )
        self._frames.put_nowait(pb.MigrationFrame(offer=offer))
        try:
            async with open_channel(self._address) as channel:
                call: Call = WorkerStub(channel).ReceiveMigration(self._outgoing())
                reader = asyncio.create_task(self._read(call), name="migration-reader")
                try:
                    error = await self._ended
                    if error:
                        await self._close(reader)
                        raise Unavailable(error)
                    return await self._conclude(started_s)
                finally:
                    reader.cancel()
                    await asyncio.gather(reader, return_exceptions=True)
                    call.cancel()
                    # gRPC reads on from the frames of a call that broke by itself.
                    self._frames.put_nowait(None)
        finally:
            if self._sender is not None:
                self._sender.close()
            # Cancelled from outside: the job stays, unless the router was asked.
            self._source.handle(TargetLost("the migration was given up"))

    async def _conclude(self, started_s: float) -> Moved:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESUME_LIMIT_S):
                await asyncio.shield(self._resumed)
        resumed_s = self._resumed.result() if self._resumed.done() else None
        source, job = self._source.source, self._source.offer
        return Moved(
            job_id=job.job_id,
            epoch=Epoch(job.epoch + 1),
            target_id=self._source.target_id,
            path=self._path(),
            rounds=source.rounds,
            moved_bytes=self._sender.sent_bytes if self._sender else 0,
            tokens=len(job.prompt_token_ids) + source.produced,
            pause_s=0.0 if resumed_s is None else resumed_s - self._frozen_s,
            duration_s=0.0 if resumed_s is None else resumed_s - started_s,
            bulk_s=(self._bulk_end_s or self._frozen_s) - self._accepted_s,
        )

    async def _close(self, reader: "asyncio.Task[None]") -> None:
        """Let the last frame go out, briefly: it spares the target a wait."""
        self._frames.put_nowait(None)
        await asyncio.wait({reader}, timeout=CLOSE_LIMIT_S)

    async def _outgoing(self) -> AsyncIterator[pb.MigrationFrame]:
        while (frame := await self._frames.get()) is not None:
            yield frame

    async def _read(self, call: Call) -> None:
        reason = "the target ended the call"
        try:
            async for reply in call:
                self._hear(reply)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        if not self._resumed.done():
            self._resumed.set_result(None)
        self._source.handle(TargetLost(reason))

    def _hear(self, reply: pb.MigrationReply) -> None:
        match reply.WhichOneof("reply"):
            case "accepted":
                self._accepted_s = time.perf_counter()
                self._start_sender(reply.accepted)
                self._source.target_id = WorkerId(reply.accepted.worker_id)
                self._source.handle(Accepted(reply.accepted.kv_tokens))
            case "progress":
                progress = reply.progress
                self._source.handle(Progress(progress.next_index, progress.kv_tokens))
                if self._bulk_end_s == 0.0 and self._source.source.gap <= BULK_GAP_TOKENS:
                    self._bulk_end_s = time.perf_counter()
            case "ready":
                self._source.handle(Ready(reply.ready.next_index))
            case "refused":
                self._source.handle(Refused(reply.refused.reason))
            case "resumed" if not self._resumed.done():
                self._resumed.set_result(time.perf_counter())

    def _start_sender(self, accepted: pb.MigrationAccepted) -> None:
        if self._memory is None or self._sender is not None:
            return
        link = Link(self._terms.kv_bytes_per_s)
        self._sender = KvSender(self._ways(accepted), self._memory, self._lose, link=link)

    def _ways(self, accepted: pb.MigrationAccepted) -> tuple[Connect, ...]:
        host, token = self._address.rpartition(":")[0], accepted.bulk_token
        stream = partial(StreamCarrier, self._address, token)
        if self._is_streamed:
            return (stream,)
        return partial(SocketCarrier, host, accepted.bulk_port, token), stream

    def _path(self) -> DataPath:
        if self._sender is None:
            return DataPath.TOKENS
        return self._sender.path or DataPath.KV

    def _lose(self, reason: str) -> None:
        """On the sender's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._source.handle, TargetLost(reason))

    def send_tokens(
        self, round_number: int, start: int, token_ids: tuple[int, ...], kv_tokens: int
    ) -> None:
        """See `SourceWire`."""
        tokens = pb.MigrationTokens(
            round=round_number, index=start, token_ids=token_ids, kv_tokens=kv_tokens
        )
        self._frames.put_nowait(pb.MigrationFrame(tokens=tokens))

    def send_blocks(
        self, start: int, end: int, block_table: tuple[int, ...], *, is_urgent: bool
    ) -> None:
        """See `SourceWire`."""
        assert self._sender is not None
        self._sender.send(start, end, block_table, is_urgent=is_urgent)

    def send_freeze(self, next_index: int, kv_tokens: int) -> None:
        """See `SourceWire`."""
        self._frozen_s = time.perf_counter()
        freeze = pb.MigrationFreeze(next_index=next_index, kv_tokens=kv_tokens)
        self._frames.put_nowait(pb.MigrationFrame(freeze=freeze))

    def commit(self) -> None:
        """See `SourceWire`."""
        epoch = self._source.offer.epoch + 1
        self._frames.put_nowait(pb.MigrationFrame(commit=pb.MigrationCommit(epoch=epoch)))

    def abort(self, reason: str) -> None:
        """See `SourceWire`."""
        self._frames.put_nowait(pb.MigrationFrame(abort=pb.MigrationAbort(reason=reason)))

    def set_timer(self, seconds: float) -> None:
        """See `SourceWire`."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds > 0:
            self._timer = self._loop.call_later(seconds, self._source_expired)

    def ended(self, error: str) -> None:
        """See `SourceWire`."""
        if not self._ended.done():
            self._ended.set_result(error)

    def _source_expired(self) -> None:
        self._source.handle(Expired())
