"""What an answer took: stage by stage, and altogether."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageReport:
    """What one stage of a cascade did for one choice. Fields mirror `gearfall.v1.StageReport`."""

    model: str
    measure: str
    """Of the certainty; empty where there is none."""
    certainty: float | None
    """In [0, 1]; None where the stage has no measure."""
    threshold: float | None
    prompt_tokens: int
    completion_tokens: int
    cost_flops: float
    duration_s: float
    queued_s: float
    epochs: int
    """Owners the job had: 1 when no worker was lost."""
    is_accepted: bool
    error: str = ""
    """Why the stage could not answer; empty when it did."""
    cached_tokens: int = 0
    """Of its prompt, whose keys and values the engine had."""
    token_logprobs: tuple[float, ...] = ()
    """Of every token, the one that ended the answer included; for requests that ask for them."""
    token_margins: tuple[float, ...] = ()
    """log p(token) - log p(second most likely), as certainty is measured from; likewise."""
    stopped_early: bool = False
    """In the middle of an answer that went up whatever would have followed. `certainty` is then the
    most that the answer could have reached or, where its beginning was decided on, that one's."""
    spared_tokens: int = 0
    """That it might still have produced then: up to `max_tokens`."""
    device_s: float = 0.0
    """Of the device: the stage's share of the steps that it ran in, prefill and decode."""
    start_s: float = 0.0
    """Expected, of the start of its model that it caused; 0 where there was no need for one, or
    another request had caused it."""
    draft_tokens: int = 0
    """Of the answer that came up from the stage below, tokens that this stage's model verified."""
    accepted_draft_tokens: int = 0
    """Of those, how many it would have said itself: so many decode steps were saved."""
    samples: int = 0
    """Answers that were asked for, where the stage counts equal ones; 0: it looks at one. Cost and
    device time are those of all, tokens and log-probabilities those of the one that is shown."""
    agreeing: int = 0
    """Of those, the ones that are the shown one, it included."""
    other_prompt_tokens: int = 0
    """Of the answers that are not shown."""
    other_completion_tokens: int = 0

    @property
    def all_prompt_tokens(self) -> int:
        """Of all answers."""
        return self.prompt_tokens + self.other_prompt_tokens

    @property
    def all_completion_tokens(self) -> int:
        """Of all answers."""
        return self.completion_tokens + self.other_completion_tokens


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and cost of one choice; the first two of the answering stage alone."""

    prompt_tokens: int
    completion_tokens: int
    total_prompt_tokens: int
    """Of all stages, rejected drafts and answers that were only counted included."""
    total_completion_tokens: int
    cost_flops: float
    cached_tokens: int = 0
    """Of `prompt_tokens`, whose keys and values the engine had."""
    device_s: float = 0.0
    """Of all stages."""
    start_s: float = 0.0
    """Of the starts that its stages caused, as expected then."""
