"""What a model can take of a job, and when its answer is whole. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from gearfall.core.generation.job import FinishReason
from services.worker.engine.batching.sequence import Sequence
from services.worker.engine_link.messages import SubmitJob


@dataclass(frozen=True, slots=True)
class JobLimits:
    """The limits that a model and its KV cache set to every job."""

    total_tokens: int
    """Most tokens of prompt and answer."""
    vocabulary_size: int
    """Token ids are below this."""
    find_adapter_fault: Callable[[str], str]
    """Says why no job can run with an adapter; empty if one can, or wants none."""

    def find_fault(self, job: SubmitJob) -> str:
        """Return what makes a job impossible here; empty if nothing does."""
        prompt, answer = job.prompt_token_ids, job.generated_token_ids
        if not prompt:
            return "the prompt has no token"
        if len(prompt) >= self.total_tokens:
            return (
                f"the prompt has {len(prompt)} tokens; this model takes at most "
                f"{self.total_tokens - 1}, so that one can be generated"
            )
        return (
            self.find_token_fault(prompt)
            or self.find_answer_fault(len(prompt), answer)
            or self.find_draft_fault(job.draft_token_ids)
            or self.find_adapter_fault(job.adapter)
        )

    def find_draft_fault(self, token_ids: tuple[int, ...]) -> str:
        """Return what makes a draft impossible; empty if nothing does, however useless it is."""
        fault = self.find_token_fault(token_ids)
        return f"the draft is not one of this model: {fault}" if fault else ""

    def cut_draft(self, job: SubmitJob) -> tuple[int, ...]:
        """Return the part of a job's draft that is of use behind its log; empty if none is.

        The answer's last token is said by the model in any case: a stop token, or the one at which
        the answer or the context is full.
        """
        sampling, answer = job.sampling, job.generated_token_ids
        most = min(sampling.max_tokens, self.total_tokens - len(job.prompt_token_ids)) - 1
        draft = job.draft_token_ids[: max(0, most)]
        if not sampling.ignore_eos:
            stops = (at for at, token in enumerate(draft) if token in sampling.stop_token_ids)
            draft = draft[: next(stops, len(draft))]
        is_ahead = len(draft) > len(answer) and draft[: len(answer)] == answer
        return draft if is_ahead else ()

    def find_answer_fault(self, before: int, token_ids: tuple[int, ...]) -> str:
        """Return why `token_ids` can't follow `before` tokens; empty if they can."""
        if before + len(token_ids) > self.total_tokens:
            return f"prompt and answer have more than {self.total_tokens} tokens"
        return self.find_token_fault(token_ids)

    def find_token_fault(self, token_ids: tuple[int, ...]) -> str:
        """Return which token does not exist; empty if all do."""
        for token in (min(token_ids), max(token_ids)) if token_ids else ():
            if not 0 <= token < self.vocabulary_size:
                return f"token id {token} is outside the vocabulary of {self.vocabulary_size}"
        return ""

    def find_finish(self, sequence: Sequence) -> FinishReason | None:
        """Return why the sequence ends with the tokens it has, None if it goes on."""
        sampling = sequence.sampling
        has_answer = sequence.next_index > 0
        is_stop = has_answer and sequence.tokens[-1] in sampling.stop_token_ids
        if is_stop and not sampling.ignore_eos:
            return FinishReason.STOP
        if sequence.next_index >= sampling.max_tokens:
            return FinishReason.LENGTH
        if has_answer and len(sequence.tokens) >= self.total_tokens:
            return FinishReason.LENGTH
        return None
