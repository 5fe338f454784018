"""The character tokenizer: exact text back, `<bos>` once, chats become trained prompts."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gearfall.demo.tokenizer import (
    BOS_ID,
    CHARACTERS,
    EOS,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    build_tokenizer,
    save_tokenizer,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path, max_tokens=256)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@given(text=st.text(alphabet=CHARACTERS, max_size=40))
def test_text_comes_back_exactly(text: str) -> None:
    tokenizer = build_tokenizer()
    encoding = tokenizer.encode(text)
    assert encoding.ids[0] == BOS_ID
    assert len(encoding.ids) == 1 + len(text)
    assert tokenizer.decode(encoding.ids) == text


def test_strange_characters_are_unknown_and_spaces_are_dropped() -> None:
    assert build_tokenizer().encode("1 x\n2").ids.count(UNK_ID) == 1
    assert build_tokenizer().encode(" 12 + 3\t=\n").ids == build_tokenizer().encode("12+3=").ids


def test_both_libraries_read_the_files_alike(directory: Path, tokenizer: Any) -> None:
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert plain.encode("123+45=").ids == tokenizer("123+45=")["input_ids"]
    assert tokenizer.decode([*tokenizer("12-3=")["input_ids"], 13, EOS_ID]) == "<bos>12-3=9<eos>"
    assert tokenizer.decode(tokenizer("12-3=")["input_ids"], skip_special_tokens=True) == "12-3="


def test_special_tokens_have_their_ids(tokenizer: Any) -> None:
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (PAD_ID, BOS_ID, EOS_ID)
    assert tokenizer.unk_token_id == UNK_ID


@pytest.mark.parametrize(
    "message",
    [
        "123+45",
        "123+45=",
        "What is 123 + 45?",
        "123 plus 45",
        [{"type": "text", "text": "123+45"}],
    ],
)
def test_a_chat_becomes_the_trained_prompt(tokenizer: Any, message: object) -> None:
    chat = [
        {"role": "system", "content": "You know 3 things."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": message},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == build_tokenizer().encode("123+45=").ids


def test_an_answered_chat_ends(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == f"<bos>1+1=2{EOS}"
