"""The safetensors header: what real files say, and every hostile one refused."""

import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.checkpoint.safetensors_header import (
    LENGTH_BYTES,
    SafetensorsHeader,
    SourceTensor,
    header_bytes,
    parse_header,
)
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest
from tests.services.store.source_directories import random_tensor, safetensors_bytes


def parse(content: bytes) -> SafetensorsHeader:
    size = header_bytes(content[:LENGTH_BYTES], len(content))
    return parse_header(content[LENGTH_BYTES : LENGTH_BYTES + size], len(content))


def one_entry(entry: dict[str, Any], body_bytes: int = 16) -> bytes:
    text = json.dumps({"x": entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body_bytes)


def test_tensors_come_by_offset_with_torch_names():
    tensors = {"b": random_tensor((2, 3)), "a": random_tensor((), dtype="F8_E4M3")}
    content = safetensors_bytes(tensors, {"format": "pt"})
    header = parse(content)
    start = len(content) - 13
    assert header.tensors == (
        SourceTensor("b", "bfloat16", (2, 3), start, 12),
        SourceTensor("a", "float8_e4m3fn", (), start + 12, 1),
    )
    assert header.metadata == {"format": "pt"}


def test_half_bytes_take_torch_packed_shape():
    header = parse(one_entry({"dtype": "F4", "shape": [4, 8], "data_offsets": [0, 16]}))
    assert header.tensors[0].shape == (4, 4)


@pytest.mark.parametrize("claimed", [2**60, 2**64 - 1, 2**31, 10_000])
def test_a_header_longer_than_its_file_is_refused(claimed: int):
    with pytest.raises(CorruptCheckpoint, match="claims"):
        header_bytes(struct.pack("<Q", claimed), 4096)


@pytest.mark.parametrize("content", [b"", b"\0\0\0", bytes(8), struct.pack("<Q", 1) + b"{"])
def test_files_without_a_header_are_refused(content: bytes):
    with pytest.raises(CorruptCheckpoint):
        parse(content)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [2**62, 2**62 + 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
        {"dtype": "F4", "shape": [4, 7], "data_offsets": [0, 14]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": 7, "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4], "data_offsets": [0, 16]},
    ],
)
def test_unsound_entries_are_refused(entry: dict[str, Any]):
    with pytest.raises(CorruptCheckpoint):
        parse(one_entry(entry))


def test_overlaps_and_bad_names_are_refused():
    entry = {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}
    for names in (["a", "b"], ["../a"], ["a\0"], [""]):
        text = json.dumps(dict.fromkeys(names, entry)).encode()
        with pytest.raises(CorruptCheckpoint):
            parse(struct.pack("<Q", len(text)) + text + bytes(16))


def test_an_unknown_dtype_is_the_callers_to_change():
    with pytest.raises(InvalidRequest, match="F6_E2M3"):
        parse(one_entry({"dtype": "F6_E2M3", "shape": [16], "data_offsets": [0, 16]}))


@given(st.data())
def test_mutated_files_raise_nothing_else(data: st.DataObject):
    tensors = {"a": random_tensor((4, 4)), "b": random_tensor((3,), dtype="F32")}
    content = bytearray(safetensors_bytes(tensors, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(content)))
        content[begin : begin + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    with contextlib.suppress(CorruptCheckpoint, InvalidRequest):
        parse(bytes(content))
