"""The target's side of a migration over gRPC: what comes with one ReceiveMigration call."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.job import Job
from gearfall.core.ids import WorkerId
from gearfall.infra.net.token_listener import TokenListener
from gearfall.pb import worker_pb2 as pb
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.jobs.job_board import JobBoard
from services.worker.migration.events import Aborted, Expired, Refused, SourceLost
from services.worker.migration.kv_groups import WINDOW_GROUPS
from services.worker.migration.kv_inlet import KvInlet
from services.worker.migration.target import MigrationTarget
from services.worker.migration.terms import Terms

_log = logging.getLogger(__name__)


class MigrationReception:
    """One job on its way here. Implements `TargetWire`; lives on when the call has broken."""

    def __init__(
        self,
        board: JobBoard,
        job: Job,
        worker_id: WorkerId,
        terms: Terms,
        kv: tuple[TokenListener, KvMemory] | None = None,
        *,
        within_s: float = 0.0,
    ) -> None:
        """`job`: under the epoch in which it is to run here.

        `kv`: where its keys and values come in, and the memory they belong in; None by tokens.
        `within_s`: the source has no more time than this; 0: it has.
        """
        self._loop = asyncio.get_running_loop()
        self._worker_id = worker_id
        self._job = job
        self._replies: asyncio.Queue[pb.MigrationReply | None] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        self._inlet: KvInlet | None = None
        if kv is not None:
            self._listener, memory = kv
            self._inlet = KvInlet(memory, self._fill, self._fail)
            self._token = self._listener.expect(self._inlet)
        self._target = MigrationTarget(
            board, job, self, terms, by_kv=kv is not None, within_s=within_s
        )

    async def serve(
        self, frames: AsyncIterator[pb.MigrationFrame]
    ) -> AsyncIterator[pb.MigrationReply]:
        """Take the job in; yield what the source is to hear. Raises InvalidRequest."""
        reader = asyncio.create_task(self._read(frames), name="migration-frames")
        reader.add_done_callback(lambda _: self.lose("the call has ended"))
        try:
            self._target.start()
            while (reply := await self._replies.get()) is not None:
                yield reply
        finally:
            self.lose("the call broke")
            reader.cancel()
        if reader.done() and not reader.cancelled() and (error := reader.exception()):
            raise error

    def lose(self, reason: str) -> None:
        """The source can't be heard any more. Idempotent."""
        self._target.handle(SourceLost(reason))

    async def _read(self, frames: AsyncIterator[pb.MigrationFrame]) -> None:
        async for frame in frames:
            self._take(frame)

    def _take(self, frame: pb.MigrationFrame) -> None:
        match frame.WhichOneof("frame"):
            case "tokens":
                tokens = frame.tokens
                self._target.take_tokens(tokens.index, tuple(tokens.token_ids), tokens.kv_tokens)
            case "freeze":
                self._target.take_freeze(frame.freeze.next_index, frame.freeze.kv_tokens)
            case "abort":
                self._target.handle(Aborted(frame.abort.reason))
            case "commit":
                pass  # the router's word counts
            case other:
                raise InvalidRequest(f"unexpected frame: {other}", param="frame")

    def accept(self, kv_tokens: int, block_table: tuple[int, ...]) -> None:
        """See `TargetWire`."""
        accepted = pb.MigrationAccepted(worker_id=self._worker_id, kv_tokens=kv_tokens)
        if self._inlet is not None:
            self._inlet.open(block_table, kv_tokens)
            accepted.bulk_port, accepted.bulk_token = self._listener.port, self._token
            accepted.window_groups = WINDOW_GROUPS
        self._replies.put_nowait(pb.MigrationReply(accepted=accepted))

    def note_blocks(self, block_table: tuple[int, ...]) -> None:
        """See `TargetWire`."""
        if self._inlet is not None:
            self._inlet.note_blocks(block_table)

    def close_blocks(self) -> None:
        """See `TargetWire`."""
        if self._inlet is not None:
            self._inlet.close()
            self._listener.forget(self._token)

    def _fill(self, kv_tokens: int) -> None:
        """On the inlet's thread."""
        self._call_soon(lambda: self._target.take_kv(kv_tokens))

    def _fail(self, reason: str) -> None:
        """On the inlet's thread."""
        self._call_soon(lambda: self._target.handle(Refused(reason)))

    def _call_soon(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(act)

    def send_progress(self, round_number: int, next_index: int, kv_tokens: int) -> None:
        """See `TargetWire`."""
        progress = pb.MigrationProgress(
            round=round_number, next_index=next_index, kv_tokens=kv_tokens
        )
        self._replies.put_nowait(pb.MigrationReply(progress=progress))

    def send_ready(self, next_index: int) -> None:
        """See `TargetWire`."""
        ready = pb.MigrationReady(next_index=next_index)
        self._replies.put_nowait(pb.MigrationReply(ready=ready))

    def send_refused(self, reason: str) -> None:
        """See `TargetWire`."""
        refused = pb.MigrationRefused(reason=reason)
        self._replies.put_nowait(pb.MigrationReply(refused=refused))

    def send_resumed(self, next_index: int) -> None:
        """See `TargetWire`."""
        resumed = pb.MigrationResumed(next_index=next_index)
        self._replies.put_nowait(pb.MigrationReply(resumed=resumed))

    def set_timer(self, seconds: float) -> None:
        """See `TargetWire`."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds > 0:
            self._timer = self._loop.call_later(seconds, self._expire)

    def ended(self, error: str) -> None:
        """See `TargetWire`."""
        job_id = self._job.job_id
        if error:
            _log.info("migration not taken in", extra={"job_id": job_id, "reason": error})
        else:
            _log.info("migration taken in", extra={"job_id": job_id, "epoch": self._job.epoch})
        self._replies.put_nowait(None)

    def _expire(self) -> None:
        self._target.handle(Expired())
