"""The canary: a prompt with the tokens a model must answer it with before it may serve.

Recorded when a model is registered, by transformers' own float32 forward pass; run by an engine
before its replica is ready. docs/decisions/0005-canary.md says why so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from gearfall.core.errors import CorruptCheckpoint

CANARY_VERSION = 1
PROMPT_TOKENS = 5
ANSWER_TOKENS = 4
"""Eight tokens are fed: on a CPU that costs little more than one, the weights being the cost."""
MAX_CANARY_BYTES = 64 * 1024
_STRIDE = 2_654_435_761
"""Spreads the prompt over the vocabulary (Knuth's multiplicative hash)."""
NOISE = 1e-3
"""Most difference that float32 sums in another order make, relative to the logits' spread."""


@dataclass(frozen=True, slots=True)
class CanaryToken:
    """One token of the answer and how exactly an engine must meet it."""

    token_id: int
    logprob: float
    """Natural log of its probability."""
    margin: float
    """Its logit less the second best's."""
    tolerance: float
    """Numeric noise at this position, in logits."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A greedy answer of one checkpoint to a fixed prompt."""

    prompt_token_ids: tuple[int, ...]
    answer: tuple[CanaryToken, ...]
    version: int = CANARY_VERSION

    @property
    def fed_token_ids(self) -> tuple[int, ...]:
        """What one pass is fed so that its last rows answer for every token of the answer.

        Where each row's best token is the answer's, the greedy run gives that answer: each of its
        steps would have been fed the same.
        """
        return (*self.prompt_token_ids, *(token.token_id for token in self.answer[:-1]))


def canary_prompt(
    vocabulary_size: int, bos_token_id: int | None, context_tokens: int
) -> tuple[int, ...]:
    """Return the prompt for a model: its first token if it has one, the rest spread out."""
    count = max(1, min(PROMPT_TOKENS, context_tokens - ANSWER_TOKENS))
    spread = [(1 + place * _STRIDE) % vocabulary_size for place in range(count)]
    if bos_token_id is not None and 0 <= bos_token_id < vocabulary_size:
        spread[0] = bos_token_id
    return tuple(spread)


def answer_length(prompt_tokens: int, context_tokens: int) -> int:
    """Return how many tokens an answer has; all but the last must fit the context."""
    return max(1, min(ANSWER_TOKENS, context_tokens - prompt_tokens + 1))


def check_answer(canary: Canary, found: Sequence[tuple[int, float]]) -> None:
    """Raise CorruptCheckpoint unless (best token, logprob of the answer's token) of each row fit.

    A token is not compared where the reference itself stood between two within numeric noise.
    """
    for place, (want, (token_id, logprob)) in enumerate(zip(canary.answer, found, strict=True)):
        is_sure = want.margin > want.tolerance
        if is_sure and token_id != want.token_id:
            raise CorruptCheckpoint(
                f"the canary failed: token {place} is {token_id}, recorded was {want.token_id}"
            )
        if not abs(logprob - want.logprob) <= want.tolerance:  # also for what is not a number
            raise CorruptCheckpoint(
                f"the canary failed: token {place} has log-probability {logprob:.4f}, "
                f"recorded was {want.logprob:.4f}"
            )


def canary_bytes(canary: Canary) -> bytes:
    """Encode it as JSON."""
    return msgspec.json.encode(canary)


def parse_canary(content: bytes) -> Canary:
    """Decode and check a canary. Raises CorruptCheckpoint for anything else."""
    if len(content) > MAX_CANARY_BYTES:
        raise CorruptCheckpoint("the canary is larger than any real one")
    try:
        canary = msgspec.json.decode(content, type=Canary)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the canary does not decode: {error}") from None
    ids = (*canary.prompt_token_ids, *(token.token_id for token in canary.answer))
    is_sound = canary.prompt_token_ids and canary.answer and all(token >= 0 for token in ids)
    if canary.version != CANARY_VERSION or not is_sound:
        raise CorruptCheckpoint("the canary is not one that this gearfall reads")
    return canary
