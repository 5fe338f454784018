"""Chat templates: rendered as Hugging Face does, bounded when hostile."""

import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.demo.tokenizer import CHAT_TEMPLATE
from services.router.generation import ChatMessage
from services.router.text.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
ASK = [ChatMessage("user", "What is 12+45?")]


def test_the_demo_template():
    assert ChatTemplate(CHAT_TEMPLATE, SPECIAL).render(ASK) == "<bos>12+45="


def test_blocks_of_hugging_face():
    source = (
        "{% for m in messages %}\n    {% generation %}{{ m|tojson }}{% endgeneration %}\n"
        "    {% break %}\n{% endfor %}{% if strftime_now is defined %}now{% endif %}"
    )
    assert ChatTemplate(source, {}).render(ASK) == ('{"role": "user", "content": "What is 12+45?"}')


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only one turn') }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 9999999999 }}",
        "{{ messages * 99999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%09999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[9].content.x }}",
    ],
)
def test_hostile_templates_are_refused(source):
    template = ChatTemplate(source, {})
    with pytest.raises(InvalidRequest) as caught:
        template.render(ASK)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | nothing }}", "x" * 300_000])
def test_templates_that_do_not_compile(source):
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {})
