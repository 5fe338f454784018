"""The requests that every engine answers, and what an answer's figures are. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

_SEED = 4


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how many tokens are generated for it, end of sequence or not."""

    prompt: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that are all there at the start; at most `batch` of them run together."""

    batch: int
    requests: tuple[Request, ...]

    @property
    def answer_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(request.answer_tokens for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests)


def make_work(batch: int, vocabulary: int, shortest: int, longest: int) -> Work:
    """Return `batch` requests, two for a batch of one.

    Lengths of prompts and of answers, in tokens, are spread evenly from `shortest` to `longest` and
    shuffled apart.
    """
    count = max(batch, 2)
    lengths = _spread(count, shortest, longest)
    drawn = random.Random(_SEED + batch)
    answers = list(lengths)
    drawn.shuffle(answers)
    drawn.shuffle(lengths)
    requests = tuple(
        Request(tuple(drawn.randrange(3, vocabulary) for _ in range(prompt)), answer)
        for prompt, answer in zip(lengths, answers, strict=True)
    )
    return Work(batch, requests)


def _spread(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths from the middle of each of `count` equal parts of the range."""
    return [shortest + (longest - shortest) * (2 * i + 1) // (2 * count) for i in range(count)]


def groups_by_length(work: Work, size: int) -> Sequence[Sequence[int]]:
    """Return the requests' places in groups of `size` with alike answer lengths."""
    order = sorted(range(len(work.requests)), key=lambda i: work.requests[i].answer_tokens)
    return [order[first : first + size] for first in range(0, len(order), size)]
