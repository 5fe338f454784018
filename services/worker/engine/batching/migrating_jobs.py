"""Held, pinned and frozen jobs of one engine, and what is reported about them. Pure.

At the target a job is held, fed and released; at the source pinned, frozen, thawed and unpinned.
A report tells where a job stands when the step is over, however many messages asked for it.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many

from services.worker.engine.batching.batch import Batch, Chunk, Sequence, SequenceKey
from services.worker.engine.batching.held_share import PATIENCE_S
from services.worker.engine.batching.job_limits import JobLimits
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS
from services.worker.engine.batching.sequence import Stance
from services.worker.engine_link.messages import (
    FeedJob,
    FreezeJob,
    HoldJob,
    JobPhase,
    JobReport,
    PinJob,
    ReleaseJob,
    ThawJob,
    UnpinJob,
)

MigrationMessage = HoldJob | FeedJob | ReleaseJob | PinJob | FreezeJob | ThawJob | UnpinJob


class MigratingJobs:
    """Performs the messages on a batch and gathers the reports for the next step's result."""

    def __init__(
        self, batch: Batch, limits: JobLimits, admit: Callable[[HoldJob], Sequence]
    ) -> None:
        """`admit`: makes the sequence of a job that is to be held."""
        self._batch = batch
        self._limits = limits
        self._admit = admit
        self._due: dict[SequenceKey, str] = {}
        """Whom to report, with the reason where something was refused."""

    @property
    def has_reports(self) -> bool:
        """Whether something is to be reported."""
        return bool(self._due)

    def take_reports(self) -> tuple[JobReport, ...]:
        """Return what is to be reported, as it stands now."""
        due, self._due = self._due, {}
        return tuple(self._report(key, error) for key, error in due.items())

    def note_computed(self, chunks: Many[Chunk]) -> None:
        """Have held jobs that advanced be reported, and pinned ones in which a block became full.

        To be called when the chunks are committed.
        """
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.is_held or (
                self._batch.blocks.is_pinned(sequence.key)
                and (chunk.start + chunk.count) // BLOCK_TOKENS > chunk.start // BLOCK_TOKENS
            ):
                self._due.setdefault(sequence.key, "")

    def handle(self, message: MigrationMessage, now_s: float) -> None:
        """Do what the message says."""
        match message:
            case HoldJob():
                self._hold(message, now_s)
            case FeedJob():
                self._feed(message)
            case UnpinJob():
                self._batch.blocks.unpin(_key(message))
            case _:
                self._change(message)

    def _hold(self, message: HoldJob, now_s: float) -> None:
        key = (message.job.job_id, message.job.epoch)
        self._due[key] = ""
        if self._batch.find(key) is not None:
            return
        fault = self._limits.find_fault(message.job)
        if not fault:
            sequence = self._admit(message)
            sequence.stance = Stance.HELD_BY_KV if message.by_kv else Stance.HELD
            patience_s = message.patience_s if message.patience_s > 0 else PATIENCE_S
            sequence.whole_by_s = now_s + patience_s
            reserve = max(0, message.reserve_tokens)
            fault = self._batch.hold(sequence, reserve_tokens=reserve, now_s=now_s)
        self._due[key] = fault

    def _feed(self, message: FeedJob) -> None:
        key = _key(message)
        sequence = self._batch.find(key)
        self._due[key] = ""
        if sequence is None or not sequence.is_held:
            return
        fault = self._append(sequence, message)
        if not fault and sequence.stance is Stance.HELD_BY_KV:
            # The last token is computed here in any case: its logits are needed.
            reached = min(message.kv_tokens, len(sequence.tokens) - 1)
            self._batch.advance(sequence, max(sequence.computed, reached))
        self._due[key] = fault

    def _append(self, sequence: Sequence, message: FeedJob) -> str:
        """Append what is new of the message's tokens; return what is wrong with them."""
        if not 0 <= message.index <= sequence.next_index:
            return f"tokens from {message.index} on leave a gap behind {sequence.next_index}"
        known = sequence.tokens[sequence.prompt_tokens + message.index :]
        overlap = min(len(known), len(message.token_ids))
        if tuple(known[:overlap]) != message.token_ids[:overlap]:
            return "the tokens differ from those that were fed before"
        fresh = message.token_ids[overlap:]
        fault = self._limits.find_answer_fault(len(sequence.tokens), fresh)
        if not fault and fresh and not self._batch.feed(sequence, fresh):
            return f"no blocks of KV cache are free for {len(fresh)} tokens more"
        return fault

    def _change(self, message: ReleaseJob | PinJob | FreezeJob | ThawJob) -> None:
        key = _key(message)
        self._due[key] = ""
        sequence = self._batch.find(key)
        if sequence is None:
            return
        match message:
            case ReleaseJob() if sequence.is_held:
                self._batch.change_stance(sequence, Stance.FREE)
            case PinJob():
                self._batch.blocks.pin(key)
            case FreezeJob() if not sequence.is_held:
                self._batch.blocks.pin(key)
                self._batch.change_stance(sequence, Stance.FROZEN)
            case ThawJob() if sequence.stance is Stance.FROZEN:
                self._batch.change_stance(sequence, Stance.FREE)

    def _report(self, key: SequenceKey, error: str) -> JobReport:
        sequence = self._batch.find(key)
        table = tuple(self._batch.blocks.table(key))
        if sequence is None:
            phase = JobPhase.ENDED if self._batch.blocks.is_left(key) else JobPhase.GONE
            return JobReport(
                *key, JobPhase.REFUSED if error else phase, block_table=table, error=error
            )
        return JobReport(
            *key,
            JobPhase.REFUSED if error else self._phase(sequence),
            next_index=sequence.next_index,
            computed_tokens=sequence.computed,
            block_table=table,
            error=error,
        )

    def _phase(self, sequence: Sequence) -> JobPhase:
        if sequence.is_held:
            return JobPhase.HELD
        if sequence.stance is Stance.FROZEN:
            return JobPhase.FROZEN
        return JobPhase.RUNNING if self._batch.is_running(sequence.key) else JobPhase.WAITING


def _key(
    message: FeedJob | ReleaseJob | PinJob | FreezeJob | ThawJob | UnpinJob,
) -> SequenceKey:
    return message.job_id, message.epoch
