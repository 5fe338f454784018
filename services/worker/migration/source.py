"""The source of one migration: performs what its state machine says on board, engine and wire.

Everything here runs without awaiting, so an event is always handled whole. The wire carries it to
the target; it may lose everything at any time.
"""

from dataclasses import replace
from typing import Protocol

from gearfall.core.errors import Unavailable
from gearfall.core.generation.job import Job, TokenRun
from gearfall.core.ids import WorkerId
from gearfall.infra.failpoints import failpoint
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS
from services.worker.engine_link.messages import (
    FreezeJob,
    JobPhase,
    JobReport,
    PinJob,
    ThawJob,
    UnpinJob,
    WorkerMessage,
)
from services.worker.jobs.claims import Claim, ClaimEvent, ClaimKey
from services.worker.jobs.job_board import JobBoard
from services.worker.migration.events import (
    AskRouter,
    End,
    Frozen,
    HandedOver,
    JobGone,
    Kept,
    Produced,
    SendBlocks,
    SendFreeze,
    SendTokens,
    SetTimer,
    SourceAct,
    SourceEffect,
    SourceEvent,
    Stored,
    TargetLost,
)
from services.worker.migration.source_table import Source, SourceState, step_source
from services.worker.migration.terms import Terms


class SourceWire(Protocol):
    """The way to the target, and the source's clock. Nothing here blocks."""

    def send_tokens(
        self, round_number: int, start: int, token_ids: tuple[int, ...], kv_tokens: int
    ) -> None:
        """Send a round."""
        ...

    def send_blocks(
        self, start: int, end: int, block_table: tuple[int, ...], *, is_urgent: bool
    ) -> None:
        """Send keys and values of tokens [start, end), which lie in these blocks.

        Urgent are those that a frozen job waits for.
        """
        ...

    def send_freeze(self, next_index: int, kv_tokens: int) -> None:
        """Say where the job stopped."""
        ...

    def commit(self) -> None:
        """Say that the router made the target the owner."""
        ...

    def abort(self, reason: str) -> None:
        """Say that the job stays here, or is over."""
        ...

    def set_timer(self, seconds: float) -> None:
        """Expire after so many seconds, in place of an earlier timer; 0: never."""
        ...

    def ended(self, error: str) -> None:
        """It is over; `error` is empty when the job moved."""
        ...


class MigrationSource:
    """A running job on its way to another worker. Implements `JobFollower`."""

    def __init__(
        self, board: JobBoard, key: ClaimKey, wire: SourceWire, terms: Terms, *, by_kv: bool
    ) -> None:
        """Follow the job from now on. Raises NotFound or Conflict when it can't be moved."""
        failpoint("source.prepare", job_id=key[0])
        self.target_id = WorkerId("")
        """Who accepted it."""
        self._board = board
        self._key = key
        self._wire = wire
        self._claim: Claim = board.follow(key, self)
        self._block_table: tuple[int, ...] = ()
        self.source = Source(
            terms,
            by_kv,
            BLOCK_TOKENS,
            produced=self._claim.next_index,
            sent=self._claim.next_index,
        )
        wire.set_timer(terms.move_limit_s)

    @property
    def offer(self) -> Job:
        """The job as it is offered: with the tokens before `source.sent` of the first moment."""
        return replace(self._claim.job, generated_token_ids=tuple(self._claim.token_ids))

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.source.state is SourceState.ENDED

    def handle(self, event: SourceEvent) -> None:
        """Step the machine and perform what it says; what can't be performed ends it."""
        before = self.source
        self.source, effects = step_source(before, event)
        try:
            for effect in effects:
                self._perform(effect)
        except Unavailable as error:
            self.source = before
            self.handle(TargetLost(error.message))

    def pushed(self, run: TokenRun) -> None:
        """See `JobFollower`."""
        self.handle(Produced(run.index + len(run.token_ids)))

    def reported(self, report: JobReport) -> None:
        """See `JobFollower`."""
        if report.block_table:
            self._block_table = report.block_table
        match report.phase:
            case JobPhase.FROZEN:
                self.handle(Frozen(report.next_index, report.computed_tokens))
            case JobPhase.RUNNING:
                self.handle(Stored(report.computed_tokens))
            case JobPhase.GONE | JobPhase.ENDED:
                self.handle(JobGone("it has ended"))

    def claim_stepped(self, event: ClaimEvent, reason: str) -> None:
        """See `JobFollower`."""
        self.handle(JobGone(reason, is_certain=event is ClaimEvent.STOP))

    def handed_over(self) -> None:
        """See `JobFollower`."""
        self.handle(HandedOver())

    def kept(self, reason: str) -> None:
        """See `JobFollower`."""
        self.handle(Kept(reason))

    def _perform(self, effect: SourceEffect) -> None:
        match effect:
            case SendTokens(number, start, end, kv_tokens):
                if number == 1:
                    failpoint("source.bulk", job_id=self._key[0])
                else:
                    failpoint("source.delta", job_id=self._key[0])
                token_ids = tuple(self._claim.token_ids[start:end])
                self._wire.send_tokens(number, start, token_ids, kv_tokens)
            case SendBlocks(start, end):
                is_urgent = self.source.state is SourceState.FROZEN
                self._wire.send_blocks(start, end, self._block_table, is_urgent=is_urgent)
            case SendFreeze(next_index, kv_tokens):
                self._wire.send_freeze(next_index, kv_tokens)
            case AskRouter(next_index):
                failpoint("source.commit", job_id=self._key[0])
                self._board.ask_handover(self._key, next_index, self.target_id)
            case SetTimer(seconds):
                self._wire.set_timer(seconds)
            case End(error):
                self._wire.set_timer(0.0)
                self._board.unfollow(self._key, self)
                self._wire.ended(error)
            case SourceAct():
                self._act(effect)

    def _act(self, act: SourceAct) -> None:
        match act:
            case SourceAct.PIN:
                self._tell_engine(PinJob(*self._key))
            case SourceAct.FREEZE:
                failpoint("source.freeze", job_id=self._key[0])
                self._tell_engine(FreezeJob(*self._key))
            case SourceAct.THAW:
                self._tell_engine(ThawJob(*self._key))
            case SourceAct.UNPIN:
                self._tell_engine(UnpinJob(*self._key))
            case SourceAct.COMMIT:
                failpoint("source.release", job_id=self._key[0])
                self._wire.commit()
            case SourceAct.ABORT:
                self._wire.abort(f"job {self._key[0]} stays or has ended")

    def _tell_engine(self, message: WorkerMessage) -> None:
        if engine := self._board.engine_of(self._claim.job.model):
            engine.send(message)
