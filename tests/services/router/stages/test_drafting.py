"""A lower stage's answer in the larger model's tokens, for models that share a tokenizer or not."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from services.router.generation import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from services.router.stages.drafting import draft_of
from services.router.stages.stage_plan import StageReady
from services.router.text.tokenizing import IN_LOOP_CHARACTERS, ModelTokenizer
from tests.services.router.char_models import (
    EOS_ID,
    TEMPLATE,
    char_tokenizer_files,
    ids_of,
    model_record,
)

CHARS = ModelTokenizer("small", char_tokenizer_files())
PROMPT = TextPrompt("say:")


def merging_tokenizer(*words: str) -> ModelTokenizer:
    """One token for each character, and for these words, which are put together from the left."""
    vocabulary = {chr(code): code - 0x20 for code in range(0x20, 0x7F)}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.decoder = decoders.Fuse()
    config = {"chat_template": TEMPLATE, "bos_token": ""}
    return ModelTokenizer("large", _files(tokenizer, config))


def byte_tokenizer() -> ModelTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({each: at for at, each in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return ModelTokenizer("bytes", _files(tokenizer, {}))


def spacing_tokenizer() -> ModelTokenizer:
    """Writes spaces as signs and drops the first when it decodes, as SentencePiece does."""
    vocabulary = {"▁": 0} | {chr(code): code - 0x20 for code in range(0x21, 0x7F)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return ModelTokenizer("spaces", _files(tokenizer, {}))


def _files(tokenizer, config):
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def stage(tokenizer, prompt=PROMPT, **facts):
    facts = {"vocabulary_size": tokenizer.vocabulary_size} | facts
    record = replace(model_record("m", context_tokens=10_000), **facts)
    return StageReady(Stage(ModelName("m"), None), record, tokenizer, tokenizer.encode(prompt), 50)


async def test_models_that_share_their_tokens_share_the_answer():
    other = ModelTokenizer("large", char_tokenizer_files(template=None))
    assert other.content_key != CHARS.content_key
    answer = (*ids_of("168"), EOS_ID)
    assert await draft_of(stage(CHARS), answer, stage(other), PROMPT) == answer
    assert await draft_of(stage(CHARS), (), stage(other), PROMPT) == ()


async def test_what_the_larger_model_does_not_know_ends_the_draft():
    larger = stage(CHARS, vocabulary_size=50)
    answer = ids_of("12z34")
    assert max(ids_of("12")) < 50 <= ids_of("z")[0]
    assert await draft_of(stage(CHARS), answer, larger, PROMPT) == ids_of("12")
    base = replace(model_record("base"), vocabulary_size=50)
    adapter = replace(stage(CHARS), base=base)
    assert await draft_of(stage(CHARS), answer, adapter, PROMPT) == ids_of("12")


@pytest.mark.parametrize("filler", ["", "x" * IN_LOOP_CHARACTERS], ids=["short", "in a thread"])
@pytest.mark.parametrize(
    "prompt", [TextPrompt("say:"), ChatPrompt((ChatMessage("user", "say"),))], ids=["text", "chat"]
)
async def test_text_is_put_into_the_larger_models_tokens(prompt, filler):
    prompt = TextPrompt(prompt.text + filler) if isinstance(prompt, TextPrompt) else prompt
    above = stage(merging_tokenizer("hello", "world"), prompt)
    below = stage(CHARS, prompt)
    answer = ids_of("hello world")
    whole = await draft_of(below, (*answer, EOS_ID), above, prompt)
    assert [above.tokenizer.token_text(each)[0] for each in whole] == ["hello", " ", "world"]
    cut = await draft_of(below, answer[:-1], above, prompt)
    assert [above.tokenizer.token_text(each)[0] for each in cut] == ["hello", " "]


async def test_a_token_over_the_prompts_end_leaves_no_draft():
    prompt = TextPrompt("say hel")
    above = stage(merging_tokenizer("hello"), prompt)
    assert await draft_of(stage(CHARS, prompt), ids_of("lo there"), above, prompt) == ()


async def test_tokens_of_one_model_say_nothing_to_another():
    prompt = TokenPrompt((4, 5))
    above = stage(merging_tokenizer("hello"), prompt)
    assert await draft_of(stage(CHARS, prompt), ids_of("hello"), above, prompt) == ()


@pytest.mark.parametrize(
    ("text", "kept_bytes", "expected"), [("aé", 3, "aé"), ("aé", 2, "a"), ("é", 1, "")]
)
async def test_a_character_that_lacks_its_end_is_left_out(text, kept_bytes, expected):
    below = stage(byte_tokenizer(), eos_token_ids=())
    above = stage(spacing_tokenizer())
    answer = below.tokenizer.encode(TextPrompt(text))[:kept_bytes]
    draft = await draft_of(below, answer, above, PROMPT)
    whole = above.tokenizer.encode_answer(PROMPT, expected) if expected else ()
    assert draft == whole[:-1]


async def test_a_space_at_the_answers_beginning_is_kept():
    below, above = stage(spacing_tokenizer(), eos_token_ids=(9,)), stage(merging_tokenizer("42"))
    answer = below.tokenizer.encode_answer(PROMPT, " 42,")
    draft = await draft_of(below, answer, above, PROMPT)
    assert [above.tokenizer.token_text(each)[0] for each in draft] == [" ", "42"]
