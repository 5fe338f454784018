"""A job: one generation on one model, as it lies in a queue and moves between workers."""

from dataclasses import dataclass
from enum import Enum

from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId, ModelName, RequestId, RouterId

GATHER_S = 0.02
"""What tokens that nobody sees yet may wait for each other at the engine: it takes their cost to
one message, and an answer that is stopped early goes on for so much longer at most."""


class FinishReason(Enum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    DEADLINE = "deadline"


class Priority(Enum):
    """Which jobs give way to which."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Job:
    """One generation on one model under one epoch. Fields mirror `gearfall.v1.Job`."""

    job_id: JobId
    request_id: RequestId
    model: ModelName
    epoch: Epoch
    router_id: RouterId
    router_address: str
    """host:port of the TokenSink that owns the token log."""
    prompt_token_ids: tuple[int, ...]
    generated_token_ids: tuple[int, ...]
    """The token log so far: generation resumes behind it."""
    sampling: SamplingParams
    deadline_unix_s: float = 0.0
    """0 means none."""
    priority: Priority = Priority.INTERACTIVE
    tenant: str = ""
    enqueued_unix_s: float = 0.0
    adapter: str = ""
    """Registered LoRA adapter that `model` runs with; empty for none."""
    draft_token_ids: tuple[int, ...] = ()
    """A guess at the whole answer, from its first token on. It changes no token of the answer: the
    engine verifies what of it continues the log, and takes as its own what it would have said."""
    gather_s: float = 0.0
    """How long a token may wait for those behind it, to be told with them: its router shows the
    answer to nobody before it is whole. 0: each step's tokens are told at once."""


@dataclass(frozen=True, slots=True)
class TokenAlternative:
    """One alternative at one token position."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive tokens of one job from one owner. Per-token tuples have equal length."""

    job_id: JobId
    epoch: Epoch
    index: int
    """Index of the first token here; 0 is the first generated token of the job."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Natural log under the model's own distribution (temperature 1, no truncation)."""
    margins: tuple[float, ...] = ()
    """logprob(top 1) - logprob(top 2) under the same distribution."""
    alternatives: tuple[tuple[TokenAlternative, ...], ...] = ()
    """Empty, or the `top_logprobs` most likely tokens for each position, best first."""
    finish: FinishReason | None = None
    error: str = ""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values the engine had; in the run that begins an answer."""
    draft_tokens: int = 0
    """Of the job's draft, tokens that were verified in the step of this run."""
    accepted_draft_tokens: int = 0
    """Of those, how many became tokens of this run."""
    device_s: float = 0.0
    """The job's share of the time of the engine's steps that it ran in, since its last run."""
    held_s: float = 0.0
    """How long the first of these tokens had waited for the others when the run was told."""

    def tail(self, count: int) -> "TokenRun":
        """Return its last `count` tokens and its end, without those before them."""
        skipped = len(self.token_ids) - count
        return TokenRun(
            job_id=self.job_id,
            epoch=self.epoch,
            index=self.index + skipped,
            token_ids=self.token_ids[skipped:],
            logprobs=self.logprobs[skipped:],
            margins=self.margins[skipped:],
            alternatives=self.alternatives[skipped:],
            finish=self.finish,
            error=self.error,
            device_s=self.device_s * count / len(self.token_ids) if count else 0.0,
        )
