"""What a caller asks for, as one value both clients share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.job import Priority
from gearfall.core.generation.streaming import StreamMode
from gearfall.infra.net.convert import priority_to_pb
from gearfall.pb import router_pb2 as pb

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages with `role` and `content`."""


class Options(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; what is absent is the server's default."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: str | Sequence[str]
    n: int
    logprobs: bool
    top_logprobs: int
    timeout_s: float
    priority: Priority
    tenant: str
    ignore_eos: bool
    request_id: str
    stream_mode: StreamMode
    hold_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One request: model or deployment, prompt and options."""

    model: str
    prompt: Prompt
    options: Options

    def to_pb(self) -> pb.GenerateRequest:
        """Return the message; raise InvalidRequest for a value that does not fit its field."""
        fields = dict(self.options)
        if "priority" in self.options:
            fields["priority"] = priority_to_pb(self.options["priority"])
        try:
            if isinstance(self.options.get("stop"), str):
                fields["stop"] = [self.options["stop"]]  # a field of several takes its letters
            if "stream_mode" in self.options:
                fields["stream_mode"] = StreamMode(self.options["stream_mode"]).value
            request = pb.GenerateRequest(model=self.model, **fields)  # type: ignore[arg-type]
            _set_prompt(request, self.prompt)
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"bad request: {error}") from error
        return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        for message in prompt:
            if not isinstance(message, Mapping):
                raise TypeError(f"{message!r} among the messages is none")
            request.chat.messages.add(role=message["role"], content=message["content"])
    else:
        request.tokens.token_ids.extend(prompt)  # type: ignore[arg-type]
        request.tokens.SetInParent()
