"""The request bodies that the REST door takes, as OpenAI defines them, and their way to a request.

Unknown fields are accepted; a known field of the wrong type or with a value that would be ignored
in silence is refused with its name.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.job import Priority
from gearfall.core.generation.streaming import parse_stream_mode
from services.router.generation import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; only text is taken."""

    type: str
    text: str | None = None


class MessageBody(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream reports beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and plain completions share."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool | None = None
    timeout_s: float | None = None
    priority: str | None = None
    stream_mode: str | None = None
    hold_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


Body = TypeVar("Body", ChatBody, CompletionBody)

_CHAT_DECODER = msgspec.json.Decoder(ChatBody)
_COMPLETION_DECODER = msgspec.json.Decoder(CompletionBody)
_WHERE = re.compile(r"(?P<rule>.*) - at `\$\.?(?P<param>.*)`", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<param>[^`]*)`")


def chat_from_json(content: bytes) -> ChatBody:
    """Return the checked body; raise InvalidRequest that names the field."""
    return _decode(_CHAT_DECODER, content)


def completion_from_json(content: bytes) -> CompletionBody:
    """Return the checked body; raise InvalidRequest that names the field."""
    return _decode(_COMPLETION_DECODER, content)


def request_from_chat(body: ChatBody, request_id: str) -> GenerationRequest:
    """Return the request that `body` asks for; raise InvalidRequest for what can't be honoured."""
    _refuse_common(body)
    _refuse(bool(body.tools), "tools")
    _refuse(bool(body.functions), "functions")
    _refuse((body.response_format or {}).get("type", "text") != "text", "response_format")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    messages = tuple(_message(each, position) for position, each in enumerate(body.messages))
    max_tokens, name = body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        max_tokens, name = body.max_completion_tokens, "max_completion_tokens"
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"{name} must be at least 1, not {max_tokens}", param=name)
    return _request(
        body,
        request_id,
        prompts=(ChatPrompt(messages),),
        max_tokens=max_tokens,
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
    )


def request_from_completion(body: CompletionBody, request_id: str) -> GenerationRequest:
    """Return the request that `body` asks for; raise InvalidRequest for what can't be honoured."""
    _refuse_common(body)
    _refuse(bool(body.echo), "echo")
    _refuse(bool(body.suffix), "suffix")
    _refuse(body.best_of is not None and body.best_of != (body.n or 1), "best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= 20:
        raise InvalidRequest(
            f"logprobs must be between 0 and 20, not {body.logprobs}", param="logprobs"
        )
    return _request(
        body,
        request_id,
        prompts=_prompts(body.prompt),
        max_tokens=body.max_tokens,
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
    )


def schemas() -> Mapping[str, Any]:
    """Return the JSON schemas of both bodies, for the API's description."""
    _, components = msgspec.json.schema_components(
        (ChatBody, CompletionBody), ref_template="#/components/schemas/{name}"
    )
    return components


def _request(
    body: GenerationBody,
    request_id: str,
    *,
    prompts: tuple[Prompt, ...],
    max_tokens: int | None,
    logprobs: bool,
    top_logprobs: int,
) -> GenerationRequest:
    return GenerationRequest(
        model=body.model,
        prompts=prompts,
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k if body.top_k is not None and body.top_k != -1 else 0,
        seed=_seed(body.seed),
        stop=_stops(body.stop),
        n=1 if body.n is None else body.n,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        timeout_s=0.0 if body.timeout_s is None else body.timeout_s,
        priority=_priority(body.priority),
        ignore_eos=bool(body.ignore_eos),
        request_id=request_id,
        is_whole=not body.stream,
        stream_mode=None if body.stream_mode is None else parse_stream_mode(body.stream_mode),
        hold_tokens=body.hold_tokens,
    )


def _decode(decoder: "msgspec.json.Decoder[Body]", content: bytes) -> Body:
    try:
        return decoder.decode(content)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from error


def _invalid(text: str) -> InvalidRequest:
    where = _WHERE.fullmatch(text)
    rule, param = (where["rule"], where["param"]) if where else (text, None)
    missing = _MISSING.search(rule)
    if missing:
        param = f"{param}.{missing['param']}" if param else missing["param"]
    return InvalidRequest(f"{param or 'body'}: {rule}", param=param)


def _message(body: MessageBody, position: int) -> ChatMessage:
    if body.content is None or isinstance(body.content, str):
        return ChatMessage(body.role, body.content or "")
    for index, part in enumerate(body.content):
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"content parts of type {part.type!r} are not supported, only text",
                param=f"messages[{position}].content[{index}]",
            )
    return ChatMessage(body.role, "".join(part.text or "" for part in body.content))


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (TextPrompt(prompt),)
    kinds = {type(each) for each in prompt}
    if kinds == {int}:
        return (TokenPrompt(tuple(each for each in prompt if isinstance(each, int))),)
    if len(kinds) != 1:
        raise InvalidRequest(
            "prompt must be a string, a list of strings, or one or more lists of token ids",
            param="prompt",
        )
    return tuple(
        TextPrompt(each) if isinstance(each, str) else TokenPrompt(tuple(each))  # type: ignore[arg-type]
        for each in prompt
    )


def _seed(seed: int | None) -> int | None:
    """OpenAI's seeds are signed 64-bit numbers; ours are the same bits unsigned."""
    return seed + 2**64 if seed is not None and -(2**63) <= seed < 0 else seed


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def _priority(name: str | None) -> Priority:
    if name in (None, "auto", "default"):
        return Priority.INTERACTIVE
    try:
        return Priority(name)
    except ValueError:
        known = ", ".join(each.value for each in Priority)
        raise InvalidRequest(f"priority is one of {known}", param="priority") from None


def _refuse_common(body: GenerationBody) -> None:
    _refuse(bool(body.presence_penalty), "presence_penalty")
    _refuse(bool(body.frequency_penalty), "frequency_penalty")
    _refuse(bool(body.logit_bias), "logit_bias")


def _refuse(is_asked: bool, param: str) -> None:
    if is_asked:
        raise InvalidRequest(
            f"{param} is not supported: leave it out", param=param, code="unsupported_parameter"
        )
