"""How a cascade's answer reaches the client while it is not yet decided which stage gives it.

| mode   | shown before it is decided | decided on                     | taken back           |
| ------ | -------------------------- | ------------------------------ | -------------------- |
| buffer | nothing                    | the stage's whole answer       | never                |
| early  | nothing                    | its first `hold_tokens` tokens | never                |
| draft  | everything                 | the stage's whole answer       | by an explicit event |
"""

from dataclasses import dataclass, replace
from enum import Enum

from gearfall.core.errors import InvalidRequest

DEFAULT_HOLD_TOKENS = 16
"""Fewer say little about an answer, more make its first word late."""
MAX_HOLD_TOKENS = 4096


class StreamMode(Enum):
    """What of an undecided stage's answer a client sees."""

    BUFFER = "buffer"
    EARLY = "early"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True)
class Streaming:
    """What is in force for a deployment, and for one request."""

    mode: StreamMode = StreamMode.BUFFER
    hold_tokens: int = DEFAULT_HOLD_TOKENS
    """Of `early`: tokens of a stage's answer that are held back and decided on."""
    finishes_drafts: bool | None = None
    """Whether a draft that can't be accepted any more is finished all the same, for the next stage
    to verify, or stopped there. None: it goes on token by token, as long as that is expected to
    save the next stage more time than it takes (`draft_worth.py`)."""


def parse_stream_mode(name: str, param: str = "stream_mode") -> StreamMode:
    """Return the mode of that name; raise InvalidRequest that lists the modes."""
    try:
        return StreamMode(name)
    except ValueError:
        known = ", ".join(each.value for each in StreamMode)
        raise InvalidRequest(f"{param} {name[:40]!r} is not one of {known}", param=param) from None


def check_hold_tokens(hold_tokens: int, param: str = "hold_tokens") -> None:
    """Raise InvalidRequest for a number of tokens that can't be held back."""
    if not 1 <= hold_tokens <= MAX_HOLD_TOKENS:
        raise InvalidRequest(
            f"{param} {hold_tokens} must be between 1 and {MAX_HOLD_TOKENS}", param=param
        )


def resolve_streaming(
    default: Streaming, mode: StreamMode | None, hold_tokens: int | None, planned: int = 0
) -> Streaming:
    """Return what a request gets that asks for `mode` and `hold_tokens`, None: as the deployment.

    planned: tokens that its gear plan decides on; 0 for whole answers, or no plan. Raises
    InvalidRequest for a number of tokens to hold back where nothing, or something else, is decided
    on them.
    """
    chosen = mode or default.mode
    if hold_tokens is not None and chosen is not StreamMode.EARLY:
        raise InvalidRequest(
            f"hold_tokens has no effect with stream_mode {chosen.value}: ask for early or leave "
            "hold_tokens out",
            param="hold_tokens",
        )
    if planned and hold_tokens not in (None, planned):
        raise InvalidRequest(
            f"hold_tokens {hold_tokens}: the gear plan decides on the first {planned} tokens; "
            "leave hold_tokens out",
            param="hold_tokens",
        )
    held = hold_tokens or planned or default.hold_tokens
    return replace(default, mode=chosen, hold_tokens=held)
