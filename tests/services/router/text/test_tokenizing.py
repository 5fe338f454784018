"""Prompts to tokens: special tokens once, templates, broken files, one fetch for all."""

import asyncio
import sys
import threading

import pytest

from gearfall.core.errors import CorruptCheckpoint, InvalidRequest, Overloaded, Unavailable
from services.router.generation import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from services.router.text.tokenizing import ModelTokenizer, TokenizerCache, encode_prompt
from tests.services.router.char_models import (
    BOS_ID,
    EOS_ID,
    Files,
    WatchedTokenizer,
    char_tokenizer_files,
    ids_of,
    model_record,
)

TOKENIZER = ModelTokenizer("small", char_tokenizer_files())


@pytest.mark.parametrize("text", ["hi", "<bos>hi"])
def test_special_tokens_are_not_doubled(text):
    assert TOKENIZER.encode(TextPrompt(text)) == (BOS_ID, *ids_of("hi"))


def test_chat_takes_special_tokens_from_the_template_alone():
    prompt = ChatPrompt((ChatMessage("user", "hi"),))
    assert TOKENIZER.encode(prompt) == (BOS_ID, *ids_of("u:hi;a:"))


def test_token_prompts_stay():
    assert TOKENIZER.encode(TokenPrompt((9, 8))) == (9, 8)


@pytest.mark.parametrize("length", [5, 500, 5000, 50_000])
def test_far_too_long_a_text_is_only_begun(length):
    text, most = "hi" * length, 200
    whole, ids = TOKENIZER.encode(TextPrompt(text)), TOKENIZER.encode(TextPrompt(text), most)
    assert ids == whole[: len(ids)]
    assert len(ids) == len(whole) or 2 * most < len(ids) < 20 * most
    assert len(ids) < 20_000


def test_a_long_text_of_few_tokens_is_read_to_its_end():
    text = "\N{PILE OF POO}" * 50_000 + "hi"
    assert TOKENIZER.encode(TextPrompt(text), 20) == TOKENIZER.encode(TextPrompt(text))


@pytest.fixture
def lock_given_only():
    """No thread takes the interpreter's lock from another one: it must be given."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("lock_given_only")
async def test_others_go_on_while_a_long_text_is_read():
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    ids = await encode_prompt(TOKENIZER, TextPrompt("hi" * 100_000))
    task.cancel()
    assert len(ids) == 200_001
    assert turns > 20


def test_text_of_tokens():
    assert TOKENIZER.decode((BOS_ID, *ids_of("hi"), EOS_ID)) == "hi"
    assert TOKENIZER.token_text(EOS_ID) == ("<eos>", b"<eos>")


def test_without_a_template_chat_is_refused():
    plain = ModelTokenizer("small", char_tokenizer_files(template=None))
    with pytest.raises(InvalidRequest, match="completions"):
        plain.encode(ChatPrompt((ChatMessage("user", "hi"),)))


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": b"{"},
        {"tokenizer.json": b"[]"},
        char_tokenizer_files() | {"tokenizer_config.json": b"no json"},
        char_tokenizer_files() | {"tokenizer_config.json": b"[]"},
    ],
)
def test_broken_files(files):
    with pytest.raises(CorruptCheckpoint):
        ModelTokenizer("small", files)


async def test_long_prompts_are_the_same_in_a_thread():
    text = "long " * 1000
    assert await encode_prompt(TOKENIZER, TextPrompt(text)) == (BOS_ID, *ids_of(text))


def chat(count: int, role: str = "u", content: str = "") -> ChatPrompt:
    return ChatPrompt((ChatMessage(role, content),) * count)


@pytest.mark.parametrize(
    ("prompts", "in_loop"),
    [
        ((TextPrompt("x" * 2048),), True),
        ((TextPrompt("x" * 2049),), False),
        ((TextPrompt("x" * 32),) * 64, True),
        ((TextPrompt("x" * 33),) * 64, False),
        ((chat(20, "user", "hi there"),), True),
        ((chat(100),), False),
        ((chat(40, "r" * 64),), False),
        ((TokenPrompt((2, 3) * 5000),), True),
    ],
)
async def test_what_is_long_together_is_read_in_a_thread(prompts, in_loop):
    tokenizer = WatchedTokenizer()
    for prompt in prompts:
        await encode_prompt(tokenizer, prompt, among=prompts)
    assert (threading.get_ident() in tokenizer.threads) == in_loop
    assert len(tokenizer.threads) == 1 or not in_loop


async def test_a_failed_fetch_is_tried_again():
    class Flaky(Files):
        is_down = True

        async def read_file(self, model, file):
            if self.is_down:
                raise Unavailable("down")
            return await super().read_file(model, file)

    source = Flaky()
    cache = TokenizerCache(source)
    record = model_record("small")
    with pytest.raises(Unavailable):
        await cache.get(record)
    source.is_down = False
    first, second = await asyncio.gather(cache.get(record), cache.get(record))
    assert first is second
    await cache.stop()


async def test_who_waits_for_a_tokenizer_when_the_cache_stops_hears_why():
    source = Files()
    source.gate.clear()
    cache, record = TokenizerCache(source), model_record("small")
    waiting, leaving = (asyncio.create_task(cache.get(record)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await cache.stop()
    results = await asyncio.gather(waiting, leaving, cache.get(record), return_exceptions=True)
    assert [type(each) for each in results] == [Overloaded, asyncio.CancelledError, Overloaded]
