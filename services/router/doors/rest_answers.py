"""Answers and stream chunks in OpenAI's two shapes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from gearfall.core.generation.job import FinishReason
from services.router.doors.answer_facts import usage_of
from services.router.generation import (
    ChoiceEnd,
    Delta,
    GenerationEvent,
    Replace,
    TokenText,
    Wait,
)

_LOWEST_LOGPROB = -9999.0
"""What OpenAI sends for a token without probability: JSON has no infinity."""
DONE = b"data: [DONE]\n\n"

FINISH_NAMES: Mapping[FinishReason, str] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.ERROR: "error",
    FinishReason.DEADLINE: "deadline",
}


class AnswerShape(ABC):
    """One request's answer in the making: feeds on events, gives chunks or the whole."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(
        self, *, request_id: str, model: str, created_unix_s: int, with_logprobs: bool
    ) -> None:
        """`model`: the name that was asked for."""
        self._id = f"{self.id_prefix}{request_id}"
        self._model = model
        self._created = created_unix_s
        self._with_logprobs = with_logprobs
        head = {
            "id": self._id,
            "object": self.chunk_name,
            "created": created_unix_s,
            "model": model,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._started: set[int] = set()

    @abstractmethod
    def _choice(self, index: int, text: str, tokens: Sequence[TokenText], finish: str) -> Any:
        """One choice of a whole answer."""

    @abstractmethod
    def _delta(self, index: int, text: str | None, tokens: Sequence[TokenText]) -> dict[str, Any]:
        """One choice of a chunk; `text` is None in a choice's last chunk."""

    def chunks(self, batch: Sequence[GenerationEvent]) -> bytes:
        """Return the server-sent events of a batch: one for each choice that got text.

        What a Replace makes void and stands in the same batch is sent before it all the same: its
        event says how much that was.
        """
        parts: list[bytes] = []
        deltas: dict[int, list[Delta]] = {}
        for event in batch:
            if isinstance(event, Delta):
                deltas.setdefault(event.choice, []).append(event)
            elif isinstance(event, Replace):
                parts += self._text_chunks(event.choice, deltas.pop(event.choice, ()))
                parts.append(self._replace_chunk(event))
            elif isinstance(event, Wait):
                line = f": waiting for {event.model}, expected {event.expected_s:.1f} s\n\n"
                parts.append(line.encode())
        for choice, pieces in deltas.items():
            parts += self._text_chunks(choice, pieces)
        return b"".join(parts)

    def _text_chunks(self, choice: int, pieces: Sequence[Delta]) -> tuple[bytes, ...]:
        if not pieces:
            return ()
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.logprobs]
        return (*self._first(choice), self._chunk(self._delta(choice, text, tokens)))

    def _replace_chunk(self, event: Replace) -> bytes:
        """A chunk whose text is empty, for clients that know nothing of `gearfall.replace`."""
        said = {
            "index": event.choice,
            "model": event.model,
            "next_model": event.next_model,
            "characters": event.characters,
            "logprobs": event.logprobs,
        }
        return self._chunk(self._delta(event.choice, "", ()), {"gearfall": {"replace": said}})

    def end_chunk(self, end: ChoiceEnd, extra: Mapping[str, Any] | None) -> bytes:
        """Return a choice's last chunk; `extra` fields go beside its choices."""
        last = self._delta(end.choice, None, ())
        last["finish_reason"] = FINISH_NAMES[end.finish]
        return b"".join((*self._first(end.choice), self._chunk(last, extra)))

    def usage_chunk(self, ends: Iterable[ChoiceEnd], n: int, extra: Mapping[str, Any]) -> bytes:
        """Return the chunk without choices that carries the usage."""
        fields = {"usage": usage_of(ends, n), **extra}
        return self._head + b"]," + orjson.dumps(fields)[1:] + b"\n\n"

    def whole(
        self,
        deltas: Mapping[int, Sequence[Delta]],
        ends: Sequence[ChoiceEnd],
        n: int,
        extra: Mapping[str, Any],
    ) -> bytes:
        """Return the body of an answer that was not streamed."""
        choices = []
        for end in ends:
            pieces = deltas.get(end.choice, ())
            text = "".join(piece.text for piece in pieces)
            tokens = [token for piece in pieces for token in piece.logprobs]
            choices.append(self._choice(end.choice, text, tokens, FINISH_NAMES[end.finish]))
        return orjson.dumps(
            {
                "id": self._id,
                "object": self.object_name,
                "created": self._created,
                "model": self._model,
                "choices": choices,
                "usage": usage_of(ends, n),
                **extra,
            }
        )

    def _first(self, choice: int) -> tuple[bytes, ...]:
        """What opens a choice, once."""
        if choice in self._started:
            return ()
        self._started.add(choice)
        opening = self._opening(choice)
        return () if opening is None else (self._chunk(opening),)

    def _opening(self, choice: int) -> dict[str, Any] | None:  # noqa: ARG002 - for subclasses
        return None

    def _chunk(self, choice: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> bytes:
        tail = b"]}\n\n" if not extra else b"]," + orjson.dumps(extra)[1:] + b"\n\n"
        return self._head + orjson.dumps(choice) + tail


class ChatShape(AnswerShape):
    """/v1/chat/completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def _choice(self, index: int, text: str, tokens: Sequence[TokenText], finish: str) -> Any:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish,
        }

    def _delta(self, index: int, text: str | None, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {} if text is None else {"content": text},
            "logprobs": self._logprobs(tokens) if text is not None else None,
            "finish_reason": None,
        }

    def _opening(self, choice: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            _token(each) | {"top_logprobs": [_token(other) for other in each.top]}
            for each in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionShape(AnswerShape):
    """/v1/completions."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def _choice(self, index: int, text: str, tokens: Sequence[TokenText], finish: str) -> Any:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish,
        }

    def _delta(self, index: int, text: str | None, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return {
            "index": index,
            "text": text or "",
            "logprobs": self._logprobs(tokens) if text is not None else None,
            "finish_reason": None,
        }

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [each.token for each in tokens],
            "token_logprobs": [_finite(each.logprob) for each in tokens],
            "top_logprobs": [
                {other.token: _finite(other.logprob) for other in each.top} for each in tokens
            ],
            "text_offset": [each.text_offset for each in tokens],
        }


def _token(token: TokenText) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": _finite(token.logprob),
        "bytes": list(token.token_bytes),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
