"""The target of one migration: performs what its state machine says on board, engine and wire.

Everything here runs without awaiting, so an event is always handled whole. The wire carries it to
the source; it may lose everything at any time.
"""

from typing import Protocol

from gearfall.core.errors import GearfallError
from gearfall.core.generation.job import Job, TokenRun
from gearfall.infra.failpoints import failpoint
from services.worker.engine_link.messages import (
    FeedJob,
    HoldJob,
    JobPhase,
    JobReport,
    WorkerMessage,
)
from services.worker.jobs.claims import ClaimEvent, ClaimKey
from services.worker.jobs.job_board import JobBoard
from services.worker.jobs.job_follower import submission
from services.worker.migration.events import (
    Accept,
    Connected,
    End,
    Feed,
    FreezeCame,
    Granted,
    Held,
    JobGone,
    KvCame,
    Pushed,
    Refused,
    Release,
    SendProgress,
    SendReady,
    SendRefused,
    SendResumed,
    SetTimer,
    TargetAct,
    TargetEffect,
    TargetEvent,
    TokensCame,
)
from services.worker.migration.target_table import Target, TargetState, step_target
from services.worker.migration.terms import Terms

RESERVED_TOKENS = 128
"""Room that is set aside for what the source produces while the job moves."""

_GONE = frozenset(
    {
        ClaimEvent.STOP,
        ClaimEvent.BROKEN,
        ClaimEvent.ROUTER_GONE,
        ClaimEvent.ENGINE_DIED,
        ClaimEvent.GIVE_BACK,
        ClaimEvent.DROP,
        ClaimEvent.FINAL_RUN,
    }
)


class TargetWire(Protocol):
    """The way to the source, and the target's clock. Nothing here blocks."""

    def accept(self, kv_tokens: int, block_table: tuple[int, ...]) -> None:
        """Say that the job is held; by KV the blocks are open for writing from `kv_tokens` on."""
        ...

    def note_blocks(self, block_table: tuple[int, ...]) -> None:
        """The held job's blocks are these now."""
        ...

    def close_blocks(self) -> None:
        """Write nothing more into the held job's blocks, from this moment on. Idempotent."""
        ...

    def send_progress(self, round_number: int, next_index: int, kv_tokens: int) -> None:
        """Say that a round is whole."""
        ...

    def send_ready(self, next_index: int) -> None:
        """Say that nothing more is needed."""
        ...

    def send_refused(self, reason: str) -> None:
        """Say that it can't be done."""
        ...

    def send_resumed(self, next_index: int) -> None:
        """Say that the job was granted and goes on."""
        ...

    def set_timer(self, seconds: float) -> None:
        """Expire after so many seconds, in place of an earlier timer; 0: never."""
        ...

    def ended(self, error: str) -> None:
        """It is over; `error` is empty when the job is this worker's now."""
        ...


class MigrationTarget:
    """A job that another worker is sending. Implements `JobFollower`."""

    def __init__(
        self,
        board: JobBoard,
        job: Job,
        wire: TargetWire,
        terms: Terms,
        *,
        by_kv: bool,
        within_s: float = 0.0,
    ) -> None:
        """`job`: with the tokens so far, under the epoch in which it is to run here.

        `within_s`: its source has no more time than this; 0: it has.
        """
        self._within_s = within_s
        self._board = board
        self._job = job
        self._wire = wire
        self._by_kv = by_kv
        self._token_ids = list(job.generated_token_ids)
        self.target = Target(
            terms, by_kv, prompt_tokens=len(job.prompt_token_ids), known=len(self._token_ids)
        )
        self._block_table: tuple[int, ...] = ()

    @property
    def key(self) -> ClaimKey:
        """(job, epoch) under which it is to run here."""
        return self._job.job_id, self._job.epoch

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.target.state is TargetState.ENDED

    def start(self) -> None:
        """Take the job in, or refuse it."""
        failpoint("target.prepare", job_id=self._job.job_id)
        self._wire.set_timer(self.target.terms.move_limit_s)
        try:
            self._board.hold(self._job, self)
        except GearfallError as error:
            self.handle(Refused(error.message))

    def handle(self, event: TargetEvent) -> None:
        """Step the machine and perform what it says."""
        self.target, effects = step_target(self.target, event)
        for effect in effects:
            self._perform(effect)

    def take_tokens(self, start: int, token_ids: tuple[int, ...], kv_tokens: int) -> None:
        """A round came from the source."""
        if self.target.round == 0:
            failpoint("target.bulk", job_id=self._job.job_id)
        else:
            failpoint("target.delta", job_id=self._job.job_id)
        if start == len(self._token_ids):
            self._token_ids.extend(token_ids)
        self.handle(TokensCame(start, start + len(token_ids), kv_tokens))

    def take_freeze(self, next_index: int, kv_tokens: int) -> None:
        """The source has stopped the job."""
        failpoint("target.freeze", job_id=self._job.job_id)
        self.handle(FreezeCame(next_index, kv_tokens))

    def take_kv(self, kv_tokens: int) -> None:
        """Keys and values of so many tokens lie in the blocks."""
        self.handle(KvCame(kv_tokens))

    def pushed(self, run: TokenRun) -> None:
        """See `JobFollower`."""
        if run.token_ids or run.finish is not None:
            self.handle(Pushed(run.index + len(run.token_ids)))

    def reported(self, report: JobReport) -> None:
        """See `JobFollower`."""
        match report.phase:
            case JobPhase.HELD:
                self._block_table = report.block_table
                self._wire.note_blocks(report.block_table)
                self.handle(Held(report.next_index, report.computed_tokens))
            case JobPhase.REFUSED:
                self.handle(Refused(report.error))
            case JobPhase.GONE:
                self.handle(Refused("the engine does not have the job"))

    def claim_stepped(self, event: ClaimEvent, reason: str) -> None:
        """See `JobFollower`."""
        if event is ClaimEvent.CONNECTED:
            self.handle(Connected())
        elif event is ClaimEvent.GRANTED:
            failpoint("target.commit", job_id=self._job.job_id)
            self.handle(Granted())
        elif event in _GONE:
            self._wire.close_blocks()
            self.handle(JobGone(reason))

    def handed_over(self) -> None:
        """See `JobFollower`: a held job is nobody's to hand over."""

    def kept(self, reason: str) -> None:
        """See `JobFollower`: a held job is nobody's to hand over."""

    def _perform(self, effect: TargetEffect) -> None:
        match effect:
            case Accept(kv_tokens):
                self._wire.accept(kv_tokens, self._block_table)
            case Feed(start, end, kv_tokens):
                token_ids = tuple(self._token_ids[start:end])
                self._tell_engine(FeedJob(*self.key, start, token_ids, kv_tokens))
            case Release():
                self._wire.close_blocks()
                self._board.release_held(self.key, self._token_ids)
            case TargetAct.HOLD:
                job = submission(self._job)
                self._tell_engine(HoldJob(job, self._by_kv, RESERVED_TOKENS, self._within_s))
            case TargetAct.DROP:
                self._wire.close_blocks()
                self._board.unfollow(self.key, self)
                self._board.drop_held(self.key, "the migration has ended")
            case SetTimer(seconds):
                self._wire.set_timer(seconds)
            case End(error):
                self._wire.set_timer(0.0)
                self._board.unfollow(self.key, self)
                self._wire.ended(error)
            case _:
                self._answer(effect)

    def _answer(self, effect: TargetEffect) -> None:
        match effect:
            case SendProgress(number, next_index, kv_tokens):
                self._wire.send_progress(number, next_index, kv_tokens)
            case SendReady(next_index):
                self._wire.send_ready(next_index)
            case SendRefused(reason):
                self._wire.send_refused(reason)
            case SendResumed(next_index):
                failpoint("target.release", job_id=self._job.job_id)
                self._wire.send_resumed(next_index)

    def _tell_engine(self, message: WorkerMessage) -> None:
        if engine := self._board.engine_of(self._job.model):
            engine.send(message)
        else:
            self.handle(Refused("the model's engine does not serve"))
