"""One request's whole answer as its client has it: collected as it is released, played again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.usage import Usage
from services.router.generation import ChoiceEnd, Delta, GenerationEvent, Replace, TokenText

_WHOLE = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class KeptChoice:
    """One choice, with nothing of how it came about."""

    choice: int
    text: str
    logprobs: tuple[TokenText, ...]
    token_count: int
    finish: FinishReason
    model: str
    """That answered."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """All choices of a request."""

    choices: tuple[KeptChoice, ...]
    cost_flops: float
    """Of computing it, all stages."""


class AnswerRecord:
    """Takes a request's events; `text` and `kept` are about what they left standing."""

    def __init__(self) -> None:
        self._deltas: dict[int, list[Delta]] = {}

    def take(self, event: GenerationEvent) -> None:
        """Note what an event adds or takes back."""
        if isinstance(event, Delta):
            self._deltas.setdefault(event.choice, []).append(event)
        elif isinstance(event, Replace):
            self._deltas.pop(event.choice, None)

    def text(self, choice: int) -> str:
        """Return a choice's text so far."""
        return "".join(each.text for each in self._deltas.get(choice, ()))

    def kept(self, ends: Mapping[int, ChoiceEnd], choices: int) -> KeptAnswer | None:
        """Return the answer if it may be given again: all of it there, none of it degraded."""
        if len(ends) != choices:
            return None
        if any(end.finish not in _WHOLE or end.degraded is not None for end in ends.values()):
            return None
        cost_flops = sum(end.usage.cost_flops for end in ends.values())
        return KeptAnswer(tuple(self._kept(ends[choice]) for choice in range(choices)), cost_flops)

    def _kept(self, end: ChoiceEnd) -> KeptChoice:
        deltas = self._deltas.get(end.choice, ())
        return KeptChoice(
            end.choice,
            self.text(end.choice),
            tuple(token for each in deltas for token in each.logprobs),
            sum(each.token_count for each in deltas),
            end.finish,
            end.model,
            end.usage.prompt_tokens,
            end.usage.completion_tokens,
        )


def play(answer: KeptAnswer, emit: Callable[[GenerationEvent], None]) -> None:
    """Emit a kept answer: each choice's text at once, then its end, at no cost."""
    for each in answer.choices:
        if each.text or each.logprobs:
            emit(Delta(each.choice, each.text, each.logprobs, each.token_count))
        usage = Usage(
            prompt_tokens=each.prompt_tokens,
            completion_tokens=each.completion_tokens,
            total_prompt_tokens=0,
            total_completion_tokens=0,
            cost_flops=0.0,
            cached_tokens=each.prompt_tokens,
        )
        emit(ChoiceEnd(each.choice, each.finish, each.model, (), usage))


def answer_to_bytes(answer: KeptAnswer) -> bytes:
    """Return an answer as `answer_from_bytes` reads it."""
    return msgspec.msgpack.encode(answer)


_DECODER = msgspec.msgpack.Decoder(KeptAnswer)


def answer_from_bytes(content: bytes) -> KeptAnswer:
    """Return what `answer_to_bytes` wrote in this process."""
    return _DECODER.decode(content)
