"""The index of shards: what it says, and that nothing else than one error comes of hostile ones."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.checkpoint.shard_index import MAX_SHARDS, parse_shard_index
from gearfall.core.errors import CorruptCheckpoint

SOUND = {
    "metadata": {"total_size": 1},
    "weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"},
}


def test_tensors_and_their_shards():
    assert parse_shard_index(json.dumps(SOUND).encode()) == SOUND["weight_map"]


@pytest.mark.parametrize(
    "weight_map",
    [
        {},
        [],
        None,
        {"a": 1},
        {"a": "../x.safetensors"},
        {"a": "/x.safetensors"},
        {"a": "x\0.safetensors"},
        {"a": "x.bin"},
        {"a": ".safetensors"},
        {f"{i}": f"{i}.safetensors" for i in range(MAX_SHARDS + 1)},
    ],
)
def test_unsound_ones(weight_map: object):
    with pytest.raises(CorruptCheckpoint):
        parse_shard_index(json.dumps({"weight_map": weight_map}).encode())


@pytest.mark.parametrize("text", [b"", b"{}", b"null", b"[" * 2**20, b'{"weight_map":' * 2**16])
def test_what_is_no_index(text: bytes):
    with pytest.raises(CorruptCheckpoint):
        parse_shard_index(text)


@given(st.data())
def test_mutated_bytes_raise_nothing_else(data: st.DataObject):
    content = bytearray(json.dumps(SOUND).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(content)))
        content[begin : begin + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    with contextlib.suppress(CorruptCheckpoint):
        parse_shard_index(bytes(content))
