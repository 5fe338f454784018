"""Incremental text: equal to the text of the whole, whole characters only, stop strings found."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.router.text.detokenizer import Detokenizer, StopScanner
from services.router.text.token_bytes import ByteReader


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, as GPT-2's alphabet spells it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Words with a leading mark for the space, whose decoder drops the first one."""
    vocabulary = {"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3, "▁": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


BYTES, WORDS = byte_tokenizer(), metaspace_tokenizer()


def pieces(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    found, at = [], 0
    while at < len(ids):
        size = sizes[at % len(sizes)] if sizes else 1
        found.append(detokenizer.feed(ids[at : at + size]))
        at += size
    return [*found, detokenizer.flush()]


@given(text=st.text(max_size=40), sizes=st.lists(st.integers(1, 5), max_size=5))
def test_pieces_join_to_the_whole_and_no_character_is_cut(text, sizes):
    ids = BYTES.encode(text).ids
    parts = pieces(BYTES, ids, sizes)
    assert "".join(parts) == BYTES.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(ids=st.lists(st.integers(0, 255) | st.sampled_from([94, 126]), max_size=40))
@example(ids=[94] * 8 + [126, 94])
def test_bytes_that_are_no_text_come_out_as_in_the_whole(ids):
    parts = pieces(BYTES, ids, [1])
    assert "".join(parts).replace("\ufffd", "") == BYTES.decode(ids).replace("\ufffd", "")


def test_undecodable_tokens_are_not_held_for_ever():
    (lone,) = BYTES.encode("é").ids[:1]
    assert any(pieces(BYTES, [lone] * 40, [1])[:-1])


@given(ids=st.lists(st.integers(1, 3), min_size=1, max_size=20))
def test_spaces_between_words_are_kept(ids):
    assert "".join(pieces(WORDS, ids, [1])) == WORDS.decode(ids)


def scan(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    scanner, out = StopScanner(stops), ""
    for part in parts:
        out += scanner.feed(part)
        if scanner.found is not None:
            return out, scanner.found
    return out + scanner.flush(), None


@given(
    parts=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stops_where_the_whole_text_has_the_first_stop(parts, stops):
    text, found = scan(stops, parts)
    whole = "".join(parts)
    assert whole.startswith(text)
    if found is None:
        assert text == whole
        assert not any(stop in whole for stop in stops)
    else:
        assert whole[len(text) :].startswith(found)
        # Nothing that a stop string could have claimed earlier was released.
        assert not any(stop in text for stop in stops)


def test_holds_back_no_more_than_could_be_a_stop():
    scanner = StopScanner(["xyz"])
    assert scanner.feed("abx") == "ab"
    assert scanner.feed("y") == ""
    assert scanner.feed("b") == "xyb"


@pytest.mark.parametrize(
    ("token", "text", "expected"), [("<0xE4>", "\ufffd", b"\xe4"), ("Ã", "\ufffd", b"\xc3")]
)
def test_token_bytes(token, text, expected):
    reader = ByteReader({"decoder": {"type": "ByteLevel"}})
    assert reader.bytes_of(token, text) == expected
    assert ByteReader({"decoder": None}).bytes_of("é", "é") == "é".encode()
