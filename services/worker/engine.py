"""Continuous batching of jobs over one model: submit, cancel, step. No socket, no process."""

import time
from collections.abc import Callable
from typing import Protocol

from gearfall.core.job import FinishReason, TokenRun
from services.worker.batch import Batch, Chunk, Sequence
from services.worker.engine_messages import CancelJob, StepDone, SubmitJob
from services.worker.packing import PackedStep, pack_step
from services.worker.sampler import Draw, Logits, Sampled, sample_rows


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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`context_tokens`: most tokens of prompt and answer; a smaller KV cache lowers it."""
        self._model = model
        self._batch = batch
        self._limit_tokens = min(context_tokens, batch.blocks.capacity_tokens)
        self._clock = clock
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._early: list[TokenRun] = []

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._sequences and not self._early

    def submit(self, job: SubmitJob) -> None:
        """Take a job in, or end it in the next step with an error that concerns it alone.

        A second submission of the same (job, epoch) changes nothing.
        """
        if (job.job_id, job.epoch) in self._sequences:
            return
        tokens = [*job.prompt_token_ids, *job.generated_token_ids]
        sequence = Sequence(
            job_id=job.job_id,
            epoch=job.epoch,
            tokens=tokens,
            prompt_tokens=len(job.prompt_token_ids),
            sampling=job.sampling,
        )
        error = self._find_fault(job)
        if error:
            self._early.append(_run(sequence, finish=FinishReason.ERROR, error=error))
            return
        finish = self._find_finish(sequence)
        if finish is not None:
            self._early.append(_run(sequence, finish=finish))
            return
        self._sequences[sequence.key] = sequence
        self._batch.submit(sequence)

    def cancel(self, job: CancelJob) -> None:
        """Forget a job before the next step; nothing more is said about it."""
        key = (job.job_id, job.epoch)
        if self._sequences.pop(key, None) is not None:
            self._batch.remove(key)

    def step(self) -> StepDone:
        """Compute one step and return what came of it."""
        started = self._clock()
        runs, self._early = self._early, []
        chunks = self._batch.plan_step()
        if chunks:
            runs += self._compute(chunks)
        return StepDone(
            runs=tuple(runs),
            running_jobs=self._batch.running,
            waiting_jobs=self._batch.waiting,
            step_s=self._clock() - started,
        )

    def check(self) -> None:
        """Assert that batch and jobs agree."""
        self._batch.check()
        assert len(self._sequences) == self._batch.running + self._batch.waiting

    def _compute(self, chunks: list[Chunk]) -> list[TokenRun]:
        logits = self._model.forward(pack_step(chunks, self._batch.blocks))
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        for chunk in chunks:
            self._batch.commit(chunk)
        draws = [Draw(sequence.sampling, sequence.next_index) for sequence in sampling]
        sampled = sample_rows(logits, draws)
        return [
            self._append(sequence, token) for sequence, token in zip(sampling, sampled, strict=True)
        ]

    def _append(self, sequence: Sequence, sampled: Sampled | None) -> TokenRun:
        """Append a token to its sequence, which ends here if it was its last."""
        if sampled is None:
            self._forget(sequence)
            error = "the model's logits are not numbers"
            return _run(sequence, finish=FinishReason.ERROR, error=error)
        index = sequence.next_index
        sequence.tokens.append(sampled.token_id)
        finish = self._find_finish(sequence)
        if finish is not None:
            self._forget(sequence)
        return TokenRun(
            job_id=sequence.job_id,
            epoch=sequence.epoch,
            index=index,
            token_ids=(sampled.token_id,),
            logprobs=(sampled.logprob,),
            margins=(sampled.margin,),
            alternatives=(sampled.alternatives,) if sampled.alternatives else (),
            finish=finish,
        )

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.key]
        self._batch.remove(sequence.key)

    def _find_finish(self, sequence: Sequence) -> FinishReason | None:
        """Why the sequence ends with the tokens it has, None if it goes on."""
        sampling = sequence.sampling
        has_answer = sequence.next_index > 0
        is_stop = has_answer and sequence.tokens[-1] in sampling.stop_token_ids
        if is_stop and not sampling.ignore_eos:
            return FinishReason.STOP
        if sequence.next_index >= sampling.max_tokens:
            return FinishReason.LENGTH
        if has_answer and len(sequence.tokens) >= self._limit_tokens:
            return FinishReason.LENGTH
        return None

    def _find_fault(self, job: SubmitJob) -> str:
        """What makes a job impossible here; empty if nothing does."""
        prompt, answer = job.prompt_token_ids, job.generated_token_ids
        if not prompt:
            return "the prompt has no token"
        if len(prompt) >= self._limit_tokens:
            return (
                f"the prompt has {len(prompt)} tokens; this model takes at most "
                f"{self._limit_tokens - 1}, so that one can be generated"
            )
        if len(prompt) + len(answer) > self._limit_tokens:
            return f"prompt and answer have more than {self._limit_tokens} tokens"
        vocabulary = self._model.vocabulary_size
        tokens = prompt + answer
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < vocabulary:
                return f"token id {token} is outside the vocabulary of {vocabulary}"
        return ""


def _run(sequence: Sequence, *, finish: FinishReason, error: str = "") -> TokenRun:
    """A run without tokens that ends a job."""
    return TokenRun(
        job_id=sequence.job_id,
        epoch=sequence.epoch,
        index=sequence.next_index,
        finish=finish,
        error=error,
    )
