"""Chat templates: text of a checkpoint, so hostile until bounded. Rendered in jinja's sandbox."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gearfall.core.errors import InvalidRequest
from services.router.generation import ChatMessage

MAX_TEMPLATE_CHARACTERS = 256 * 1024
MAX_TEXT_CHARACTERS = 16 * 1024 * 1024
MAX_LOOP_STEPS = 200_000
_TICK = "gearfall_tick"
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """One compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: bos_token, eos_token and their kin as text.

        Raises InvalidRequest when the template does not compile or is too long.
        """
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise InvalidRequest(f"the chat template has over {MAX_TEMPLATE_CHARACTERS} characters")
        try:
            self._template = _environment().from_string(source)
        except (TemplateError, RecursionError) as error:
            raise InvalidRequest(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Return the text of the conversation, ready for the assistant's answer.

        Raises InvalidRequest when the template refuses the messages or breaks a bound.
        """
        steps = _Steps()
        try:
            pieces = self._template.generate(
                messages=[{"role": each.role, "content": each.content} for each in messages],
                add_generation_prompt=True,
                tools=None,
                **self._special_tokens,
                **{_TICK: steps.tick},
            )
            return _join(pieces)
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error


def _join(pieces: Any) -> str:
    parts: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_TEXT_CHARACTERS:
            raise ValueError("its text is too long")
        parts.append(piece)
    return "".join(parts)


class _Steps:
    """Counts the loop steps of one rendering."""

    def __init__(self) -> None:
        self._left = MAX_LOOP_STEPS

    def tick(self) -> str:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it loops more than {MAX_LOOP_STEPS} times")
        return ""


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Bounds loops and the operators that make large values out of small ones."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            tick = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            loop.body.insert(0, nodes.Output([tick]).set_lineno(loop.lineno))
            loop.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse what could fill the memory."""
        if operator == "**" or (operator == "%" and not isinstance(left, int)):
            raise TypeError(f"operator {operator} is not available")
        if operator == "*" and not all(isinstance(each, (int, float)) for each in (left, right)):
            raise TypeError("only numbers are multiplied")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """Hugging Face's `{% generation %}` block, which marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: Any) -> list[nodes.Node]:
        """Return the block's body."""
        parser.stream.skip(1)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    if isinstance(value, Undefined):
        raise TemplateError("tojson of an undefined value")
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    for name in ("center", "format", "indent", "wordwrap", "xmlattr", "urlize", "random"):
        environment.filters.pop(name, None)
    environment.globals["raise_exception"] = _raise_exception
    return environment
