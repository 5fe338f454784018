"""The way of the REST door's bodies to a request.

Unknown fields are accepted; a known field of the wrong type or with a value that would be ignored
in silence is refused with its name.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.job import Priority
from gearfall.core.generation.streaming import parse_stream_mode
from services.router.doors.rest_bodies import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    MessageBody,
)
from services.router.generation import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
    check_tenant,
)

Body = TypeVar("Body", ChatBody, CompletionBody)

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""Fields that change answers elsewhere, by the values that ask for nothing: others are refused."""
_UNSUPPORTED_IN_CHAT: Mapping[str, tuple[Any, ...]] = {
    **_UNSUPPORTED,
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": ([], ["text"]),
    "audio": (),
    "web_search_options": (),
}
_UNSUPPORTED_IN_COMPLETIONS: Mapping[str, tuple[Any, ...]] = {
    **_UNSUPPORTED,
    "echo": (False,),
    "suffix": ("",),
}
_UNSUPPORTED_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {"tool_calls": ([],), "function_call": ()}
_SHOWN_CHARACTERS = 40

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
    _refuse_fields(body, _UNSUPPORTED_IN_CHAT)
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
    _refuse_fields(body, _UNSUPPORTED_IN_COMPLETIONS)
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
        tenant=check_tenant(body.tenant or ""),
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
    _refuse_fields(body, _UNSUPPORTED_IN_MESSAGES, f"messages[{position}].")
    if body.content is None or isinstance(body.content, str):
        return ChatMessage(body.role, body.content or "")
    for index, part in enumerate(body.content):
        if part.type != "text" or part.text is None:
            kind = (
                f"of type {part.type[:_SHOWN_CHARACTERS]!r}"
                if part.type != "text"
                else "without text"
            )
            raise InvalidRequest(
                f"content parts {kind} are not supported, only text",
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


def _refuse_fields(body: object, unsupported: Mapping[str, tuple[Any, ...]], at: str = "") -> None:
    for name, harmless in unsupported.items():
        value = getattr(body, name)
        _refuse(value is not None and value not in harmless, f"{at}{name}")


def _refuse(is_asked: bool, param: str) -> None:
    if is_asked:
        raise InvalidRequest(
            f"{param} is not supported: leave it out", param=param, code="unsupported_parameter"
        )
