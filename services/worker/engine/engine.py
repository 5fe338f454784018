"""Continuous batching of jobs over one model: submit, cancel, move, step. No socket, no process."""

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from typing import Protocol

from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.ids import Epoch, JobId
from gearfall.infra.failpoints import failpoint
from services.worker.engine.batching.adapter_jobs import AdapterHost, AdapterJobs, NoAdapters
from services.worker.engine.batching.batch import Batch, Chunk, Sequence
from services.worker.engine.batching.device_time import DeviceTime
from services.worker.engine.batching.job_limits import JobLimits
from services.worker.engine.batching.migrating_jobs import MigratingJobs, MigrationMessage
from services.worker.engine.batching.packing import PackedStep, pack_step
from services.worker.engine.batching.sequence import NO_DEADLINE_S
from services.worker.engine.batching.slowdown import Slowdown
from services.worker.engine.beside import Beside
from services.worker.engine.drafts import count_right, say
from services.worker.engine.foretelling import Foretelling
from services.worker.engine.model.sampler import Logits, Rows, Sampled
from services.worker.engine.step_log import StepLog
from services.worker.engine_link.messages import (
    AttachAdapter,
    CancelJob,
    DropAdapter,
    FeedJob,
    HoldJob,
    ReleaseJob,
    StepDone,
    SubmitJob,
)

BESIDE_WAIT_S = 0.01
"""How long a step without tokens waits for those that are computed beside it."""


class _Named(Protocol):
    """A job, or a message about one."""

    @property
    def job_id(self) -> JobId: ...

    @property
    def epoch(self) -> Epoch: ...


class Model(Protocol):
    """What an engine runs."""

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        ...

    def forward(self, step: PackedStep) -> Logits:
        """Return logits [R, vocabulary] for the R tokens in `step.logit_rows`."""
        ...


class Engine:
    """The jobs of one engine process and their way through the batch."""

    def __init__(
        self,
        model: Model,
        batch: Batch,
        *,
        context_tokens: int,
        adapters: AdapterHost | None = None,
        step_log: StepLog | None = None,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        """`context_tokens`: most tokens of prompt and answer; a smaller KV cache lowers it.

        `adapters`: where LoRA adapters are attached; None for a model that takes none. `step_log`:
        where each step is noted; None: nowhere.
        """
        self._model = model
        self._batch = batch
        self._adapters = AdapterJobs(adapters or NoAdapters(), batch.has_adapter)
        self._limits = JobLimits(
            min(context_tokens, batch.blocks.capacity_tokens),
            model.vocabulary_size,
            self._adapters.find_fault,
        )
        self._clock = clock
        self._unix_clock = unix_clock
        self.device_time = DeviceTime(lambda key: batch.find(key) is not None)
        """Whose the time of the steps was."""
        self._slowdown = Slowdown()
        self._step_log = step_log
        self._sampled_s = 0.0
        """When the tokens of the newest step were known."""
        self._migrating = MigratingJobs(batch, self._limits, lambda hold: self._admit(hold.job))
        self.foretelling = Foretelling(batch, self._find_foretellable)
        """First tokens of jobs that waited for the model."""
        self.beside = Beside(batch, clock)
        """Held jobs' tokens that are computed beside the steps."""
        self._early: list[TokenRun] = []
        self._is_foretold_due = False
        self._is_stuck = False

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing before another message has come."""
        has_jobs = self._batch.running + self._batch.waiting > 0 and not self._is_stuck
        has_reports = self._migrating.has_reports or self._adapters.has_reports
        is_computing = has_jobs or self.beside.is_busy
        return not is_computing and not self._early and not has_reports

    def submit(self, job: SubmitJob) -> None:
        """Take a job in, or end it in the next step with an error that concerns it alone.

        A second submission of the same (job, epoch) changes nothing.
        """
        self._is_stuck = False
        if self._batch.find((job.job_id, job.epoch)) is not None:
            return
        self._settle_beside(job)
        sequence = self._admit(job)
        error = self._limits.find_fault(job)
        if error:
            self._early.append(self._end(sequence, FinishReason.ERROR, error))
            return
        finish = self._limits.find_finish(sequence)
        if finish is not None:
            self._early.append(self._end(sequence, finish))
            return
        self._batch.submit(sequence, self._clock())
        foretold = self.foretelling.take(job, sequence)
        if foretold is not None:
            self._early.append(self._take(sequence, [foretold]))
            self._is_foretold_due = True

    def cancel(self, job: CancelJob) -> None:
        """Forget a job before the next step; nothing more is said about it."""
        self._is_stuck = False
        self._batch.cancel((job.job_id, job.epoch))
        self._adapters.settle()

    def attach(self, message: AttachAdapter, descriptors: Many[int]) -> None:
        """Take in an adapter, whose descriptors are closed; the next step reports it."""
        self._adapters.attach(message, descriptors)

    def drop(self, message: DropAdapter) -> None:
        """Let go of an adapter once no job runs with it; nothing is said about it."""
        self._adapters.drop(message)

    def migrate(self, message: MigrationMessage) -> None:
        """Hold, feed, release, pin, freeze, thaw or unpin a job; the next step reports it."""
        self._is_stuck = False
        if isinstance(message, HoldJob):
            self._settle_beside(message.job)
        elif not isinstance(message, FeedJob | ReleaseJob):
            self._settle_beside(message)
        self._migrating.handle(message, self._clock())
        if isinstance(message, HoldJob) and message.by_kv:
            self.beside.touch((message.job.job_id, message.job.epoch))
        if isinstance(message, ReleaseJob):
            self._end_if_whole(message)

    def step(self) -> StepDone:
        """Compute one step and return what came of it."""
        started_s = self._clock()
        runs, self._early = self._early, []
        runs += [
            self._end(sequence, FinishReason.DEADLINE) for sequence in self._batch.expire(started_s)
        ]
        self.look_beside()
        if self._step_log is not None:
            self._step_log.begin()
        chunks = self._batch.plan_step(started_s)
        self._is_stuck = not chunks and not self.beside.is_busy
        if chunks:
            runs += self._compute(chunks, started_s)
        elif self.beside.is_busy:
            self._collect_beside(BESIDE_WAIT_S)
        self._adapters.settle()
        step_s = self._clock() - started_s
        self._batch.held_share.note(chunks, step_s)
        if chunks:
            self.device_time.add_rest(step_s - (self._sampled_s - started_s))
            self._slowdown.note(chunks, step_s)
            if self._step_log is not None:
                self._step_log.end(sum(chunk.count for chunk in chunks), step_s)
        return self._tell(runs, step_s)

    def look_beside(self) -> None:
        """Take in what was computed beside the steps, and have more of it be computed."""
        self._collect_beside(0.0)
        chunk = self.beside.begin(self._clock())
        if chunk is not None:
            _pass_points([chunk])

    @property
    def has_reports(self) -> bool:
        """Whether there is something to say that needs no step."""
        return self._migrating.has_reports or self._is_foretold_due

    def report(self) -> StepDone:
        """Return what is known between two steps: nothing of it waits for the next one."""
        runs, self._early = self._early, []
        return self._tell(runs, 0.0)

    def _tell(self, runs: Many[TokenRun], step_s: float) -> StepDone:
        self._is_foretold_due = False
        return StepDone(
            runs=tuple(runs),
            running_jobs=self._batch.running,
            waiting_jobs=self._batch.waiting,
            step_s=step_s,
            reports=self._migrating.take_reports(),
            adapters=self._adapters.take_reports(),
            kv_blocks=self._batch.blocks.total_blocks,
            kv_used_blocks=self._batch.blocks.total_blocks - self._batch.blocks.free_blocks,
            slowdown=self._slowdown.ratio,
        )

    def check(self) -> None:
        """Assert the invariants of batch, time and adapters."""
        self._batch.check()
        self.device_time.check()
        self._adapters.check()

    def _collect_beside(self, timeout_s: float) -> None:
        found = self.beside.collect(timeout_s)
        if found is not None:
            chunk, computed_s = found
            self.device_time.add(chunk.sequence.key, computed_s)
            self._migrating.note_computed([chunk])

    def _settle_beside(self, job: _Named) -> None:
        """Wait for what is computed of a job beside the steps, before its blocks are another's."""
        while self.beside.has((job.job_id, job.epoch)):
            self._collect_beside(BESIDE_WAIT_S)

    def _admit(self, job: SubmitJob) -> Sequence:
        """Return the sequence of a job."""
        deadline_s = NO_DEADLINE_S
        if job.deadline_unix_s > 0:
            deadline_s = self._clock() + job.deadline_unix_s - self._unix_clock()
        return Sequence(
            job_id=job.job_id,
            epoch=job.epoch,
            tokens=[*job.prompt_token_ids, *job.generated_token_ids],
            prompt_tokens=len(job.prompt_token_ids),
            sampling=job.sampling,
            tenant=job.tenant,
            adapter=job.adapter,
            priority=job.priority,
            deadline_s=deadline_s,
            draft=self._limits.cut_draft(job),
        )

    def _find_foretellable(self, job: SubmitJob) -> Sequence | None:
        """Return the sequence of a job that can be computed, None if it can't or is whole.

        Without its draft: of each job one token is foretold.
        """
        sequence = self._admit(job)
        sequence.draft = ()
        if self._limits.find_fault(job) or self._limits.find_finish(sequence) is not None:
            return None
        return sequence

    def _end_if_whole(self, message: ReleaseJob) -> None:
        """End a released job whose log needed nothing more."""
        sequence = self._batch.find((message.job_id, message.epoch))
        finish = None if sequence is None else self._limits.find_finish(sequence)
        if sequence is not None and finish is not None:
            self._batch.remove(sequence.key)
            self._early.append(self._end(sequence, finish))

    def _compute(self, chunks: list[Chunk], started_s: float) -> list[TokenRun]:
        _pass_points(chunks)
        logits = self._model.forward(pack_step(chunks, self._batch.blocks))
        sampling = [(chunk.sequence, chunk.guess) for chunk in chunks if chunk.samples]
        for chunk in chunks:
            self._batch.commit(chunk)
        self._migrating.note_computed(chunks)
        rows = Rows(logits, [one.sampling for one, guess in sampling for _ in (0, *guess)])
        said, row = [], 0
        for sequence, guess in sampling:
            said.append((sequence, tuple(say(rows, row, sequence, guess)), guess))
            row += 1 + len(guess)
        self._sampled_s = self._clock()
        self.device_time.divide(chunks, self._sampled_s - started_s)
        return [self._take(sequence, sampled, guess) for sequence, sampled, guess in said]

    def _take(
        self, sequence: Sequence, sampled: Iterable[Sampled | None], guess: tuple[int, ...] = ()
    ) -> TokenRun:
        """Append tokens to their sequence, which ends with the one that was its last.

        `guess`: what was computed with them. Whatever of it was wrong leaves nothing behind.
        """
        index, cached_tokens = sequence.next_index, sequence.cached_tokens or 0
        taken: list[Sampled] = []
        finish, error = None, ""
        for each in sampled:
            if each is None:
                finish, error = FinishReason.ERROR, "the model's logits are not numbers"
                break
            taken.append(each)
            self._batch.append(sequence, each.token_id)
            finish = self._limits.find_finish(sequence)
            if finish is not None:
                break
        if guess and taken:
            self._batch.accept(sequence)
            failpoint("draft.accept", job_id=sequence.job_id)
        if finish is not None:
            self._batch.remove(sequence.key)
        return TokenRun(
            job_id=sequence.job_id,
            epoch=sequence.epoch,
            index=index,
            token_ids=tuple(each.token_id for each in taken),
            logprobs=tuple(each.logprob for each in taken),
            margins=tuple(each.margin for each in taken),
            alternatives=tuple(each.alternatives for each in taken if each.alternatives),
            finish=finish,
            error=error,
            cached_tokens=cached_tokens if index == 0 and taken else 0,
            draft_tokens=len(guess),
            accepted_draft_tokens=count_right(guess, taken),
            device_s=self.device_time.take(sequence.key),
        )

    def _end(self, sequence: Sequence, finish: FinishReason, error: str = "") -> TokenRun:
        """A run without tokens that ends a job."""
        return TokenRun(
            job_id=sequence.job_id,
            epoch=sequence.epoch,
            index=sequence.next_index,
            finish=finish,
            error=error,
            device_s=self.device_time.take(sequence.key),
        )


def _pass_points(chunks: list[Chunk]) -> None:
    for chunk in chunks:
        if chunk.start < chunk.sequence.prompt_tokens:
            failpoint("engine.prefill", job_id=chunk.sequence.job_id)
        else:
            failpoint("engine.decode", job_id=chunk.sequence.job_id)
        if chunk.guess:
            failpoint("draft.verify", job_id=chunk.sequence.job_id)
