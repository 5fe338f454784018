"""What gearfall and vLLM say to each other about a request, and its way to gearfall's values."""

from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from gearfall.core.generation.job import FinishReason, Priority, TokenAlternative, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from services.worker.engine.batching.sequence import Sequence
from services.worker.engine_link.messages import SubmitJob


@dataclass(frozen=True, slots=True)
class VllmToken:
    """One generated token."""

    token_id: int
    logprobs: Mapping[int, float]
    """Natural logs of the most likely tokens, two at least, and of this one."""


@dataclass(frozen=True, slots=True)
class VllmRequest:
    """What is asked of vLLM."""

    request_id: str
    token_ids: Many[int]
    """Prompt and log."""
    sampling: SamplingParams
    """`max_tokens` counts from here on, `seed` is this request's own."""
    tenant: str
    """Prefixes are shared within it only."""
    priority: Priority


class VllmClient(Protocol):
    """The part of vLLM that jobs need; `services.worker.engine.vllm` has the real one."""

    def generate(self, request: VllmRequest) -> AsyncGenerator[Many[VllmToken], None]:
        """Yield tokens as they come. Closing or cancelling it aborts the request.

        Raises ConnectionError when the engine is dead, anything else for this request alone.
        """
        ...


def sequence_of(job: SubmitJob) -> Sequence:
    """Return a job's prompt and log as the values that limits are asked about."""
    return Sequence(
        job_id=job.job_id,
        epoch=job.epoch,
        tokens=[*job.prompt_token_ids, *job.generated_token_ids],
        prompt_tokens=len(job.prompt_token_ids),
        sampling=job.sampling,
        tenant=job.tenant,
        priority=job.priority,
    )


def end_of(sequence: Sequence, finish: FinishReason, error: str) -> TokenRun:
    """Return a run without tokens that ends a job."""
    return TokenRun(
        sequence.job_id, sequence.epoch, sequence.next_index, finish=finish, error=error
    )


def run_of(
    sequence: Sequence, index: int, token: VllmToken, finish: FinishReason | None
) -> TokenRun:
    """Return one token as gearfall's engine reports it; most likely first, then the lower id."""
    ranked = sorted(token.logprobs.items(), key=lambda item: (-item[1], item[0]))
    wanted = sequence.sampling.top_logprobs
    top = tuple(TokenAlternative(*item) for item in ranked[:wanted])
    return TokenRun(
        job_id=sequence.job_id,
        epoch=sequence.epoch,
        index=index,
        token_ids=(token.token_id,),
        logprobs=(token.logprobs[token.token_id],),
        margins=(ranked[0][1] - ranked[1][1],),
        alternatives=(top,) if wanted else (),
        finish=finish,
    )
