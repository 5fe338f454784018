"""The manifest: round trip, and every unsound one refused with the one right error."""

import contextlib
import json
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.checkpoint.dtypes import DTYPE_BYTES
from gearfall.core.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    AdapterFacts,
    AliasEntry,
    FileEntry,
    Manifest,
    ModelFacts,
    PartitionEntry,
    SourceFileEntry,
    TensorEntry,
    manifest_bytes,
    manifest_digest,
    parse_manifest,
)
from gearfall.core.checkpoint.manifest_split import Section, Split
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest

FACTS = ModelFacts("LlamaForCausalLM", 96, 64, 16, 0, (1, 2), "bfloat16", 2, 1, 4, False)


def sound_manifest() -> Manifest:
    return Manifest(
        format_version=1,
        model=FACTS,
        partitions=(
            PartitionEntry("partition-0.bin", 12288, 8192, ("0" * 16, "f" * 16)),
            PartitionEntry("partition-1.bin", 4096, 4096, ("a" * 16,)),
        ),
        tensors=(
            TensorEntry("a", "bfloat16", (4, 8), 0, 0, 64),
            TensorEntry("b", "float32", (), 0, 256, 4),
            TensorEntry("empty", "bool", (0, 7), 0, 512, 0),
            TensorEntry("c", "float8_e4m3fn", (3000,), 0, 8192, 3000),
            TensorEntry("d", "int64", (1,), 1, 0, 8),
        ),
        aliases=(AliasEntry("e", "a"),),
        files=(FileEntry("config.json", 10, "0123456789abcdef"),),
        source_revision="0" * 40,
    )


def cut_manifest() -> Manifest:
    """An adapter of two ranks: a fused tensor in two parts, one whole in both, headers kept."""
    split = Split(1, (Section(4, 2, 2), Section(2, 1, 0)))
    return Manifest(
        format_version=1,
        model=FACTS,
        adapter=AdapterFacts("0123456789abcdef" * 2, 8, 16.0, is_rank_stabilised=True),
        partitions=tuple(
            PartitionEntry(f"partition-{rank}.bin", 4096, 4096, ("0" * 16,)) for rank in (0, 1)
        ),
        tensors=(
            TensorEntry("fused", "uint8", (3, 4), 0, 0, 12, split),
            TensorEntry("norm", "float32", (2,), 0, 256, 8),
            TensorEntry("fused", "uint8", (3, 4), 1, 0, 12, split),
            TensorEntry("norm", "float32", (2,), 1, 256, 8),
        ),
        aliases=(AliasEntry("twin", "fused"),),
        files=(FileEntry("source-headers.bin", 120, "f" * 16),),
        source_files=(
            SourceFileEntry("a.safetensors", 100, 60),
            SourceFileEntry("b.safetensors", 60, 60),
        ),
    )


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(manifest_bytes(sound_manifest()))
    return loaded


def test_round_trip():
    content = manifest_bytes(sound_manifest())
    assert parse_manifest(content) == sound_manifest()
    assert manifest_bytes(parse_manifest(content)) == content
    assert len(manifest_digest(content)) == 32


def test_round_trip_of_parts():
    content = manifest_bytes(cut_manifest())
    assert parse_manifest(content) == cut_manifest()
    assert manifest_bytes(parse_manifest(content)) == content


def test_parts_know_the_whole():
    manifest = cut_manifest()
    assert manifest.ranks == 2
    entries = manifest.entries_by_name()
    assert entries["twin"] == entries["fused"]
    assert [entry.full_shape for entry in entries["fused"]] == [(3, 6), (3, 6)]
    assert entries["fused"][0].full_bytes == 18
    with pytest.raises(InvalidRequest, match="2 ranks"):
        manifest.tensors_by_name()


def test_an_alias_names_the_bytes_of_its_target():
    named = sound_manifest().tensors_by_name()
    assert named["e"] is named["a"]
    assert sound_manifest().size_bytes == 12288 + 4096


def test_kv_bytes_count_keys_and_values_of_every_layer():
    assert FACTS.kv_bytes_per_token() == 2 * 2 * 1 * 4 * 4
    assert FACTS.kv_bytes_per_token(element_bytes=2) == 2 * 2 * 1 * 4 * 2


def test_an_unknown_field_is_left_to_later_versions():
    assert parse_manifest(json.dumps(document() | {"later": {"x": [1]}}).encode())


UNSOUND: list[tuple[str, list[Any], Any]] = [
    ("format", ["format"], "zip"),
    ("unknown version", ["format_version"], 2),
    ("version of another type", ["format_version"], "1"),
    ("enormous version", ["format_version"], 10**200),
    ("no partitions", ["partitions"], []),
    ("no tensors", ["tensors"], []),
    ("negative offset", ["tensors", 0, "offset_bytes"], -256),
    ("overflowing offset", ["tensors", 0, "offset_bytes"], 2**64),
    ("offset past the end", ["tensors", 3, "offset_bytes"], 12288 - 256),
    ("unaligned offset", ["tensors", 1, "offset_bytes"], 128),
    ("overlap", ["tensors", 0, "shape"], [16, 16]),
    ("order", ["tensors", 1, "offset_bytes"], 1024),
    ("negative size", ["tensors", 0, "size_bytes"], -64),
    ("huge size", ["tensors", 0, "size_bytes"], 2**60),
    ("size without its shape", ["tensors", 0, "size_bytes"], 62),
    ("negative length", ["tensors", 0, "shape"], [-4, -8]),
    ("product beyond 64 bits", ["tensors", 0, "shape"], [2**40] * 4),
    ("rank", ["tensors", 0, "shape"], [1] * 100),
    ("fractional length", ["tensors", 0, "shape"], [4.5, 8]),
    ("unknown dtype", ["tensors", 0, "dtype"], "float7"),
    ("wrong dtype", ["tensors", 0, "dtype"], "float32"),
    ("negative partition", ["tensors", 0, "partition"], -1),
    ("partition past the end", ["tensors", 4, "partition"], 2),
    ("duplicate tensor", ["tensors", 1, "name"], "a"),
    ("tensor name with NUL", ["tensors", 0, "name"], "a\0b"),
    ("tensor name with ../", ["tensors", 0, "name"], "../a"),
    ("empty tensor name", ["tensors", 0, "name"], ""),
    ("endless tensor name", ["tensors", 0, "name"], "a" * 10_000),
    ("alias of nothing", ["aliases", 0, "target"], "z"),
    ("alias of an alias", ["aliases", 0, "target"], "e"),
    ("alias that hides a tensor", ["aliases", 0, "name"], "b"),
    ("partition file with ../", ["partitions", 0, "file"], "../../etc/passwd"),
    ("absolute partition file", ["partitions", 0, "file"], "/etc/passwd"),
    ("hidden partition file", ["partitions", 0, "file"], ".ssh"),
    ("partition file with NUL", ["partitions", 0, "file"], "a\0b"),
    ("the manifest as partition", ["partitions", 0, "file"], "manifest.json"),
    ("one file for two partitions", ["partitions", 0, "file"], "partition-1.bin"),
    ("ragged partition", ["partitions", 0, "size_bytes"], 12287),
    ("empty partition", ["partitions", 1, "size_bytes"], 0),
    ("negative partition size", ["partitions", 0, "size_bytes"], -4096),
    ("huge partition", ["partitions", 0, "size_bytes"], 2**62),
    ("no chunk size", ["partitions", 0, "chunk_bytes"], 0),
    ("negative chunk size", ["partitions", 0, "chunk_bytes"], -4096),
    ("ragged chunk size", ["partitions", 0, "chunk_bytes"], 5000),
    ("too few checksums", ["partitions", 0, "checksums"], ["0" * 16]),
    ("checksum of another kind", ["partitions", 1, "checksums"], ["g" * 16]),
    ("file with ../", ["files", 0, "name"], "../config.json"),
    ("negative file size", ["files", 0, "size_bytes"], -1),
    ("bad file checksum", ["files", 0, "checksum"], "0"),
    ("duplicate file", ["files", 0, "name"], "partition-0.bin"),
    ("revision", ["source_revision"], "../" * 3),
    ("architecture", ["model", "architecture"], ""),
    ("context", ["model", "context_tokens"], 0),
    ("layers", ["model", "layers"], 2**40),
    ("token", ["model", "eos_token_ids"], [-1]),
]


@pytest.mark.parametrize(
    ("where", "value"), [case[1:] for case in UNSOUND], ids=[case[0] for case in UNSOUND]
)
def test_unsound_manifests_are_refused(where: list[Any], value: Any):
    broken = document()
    place: Any = broken
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    with pytest.raises(CorruptCheckpoint):
        parse_manifest(json.dumps(broken).encode())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{" * 2**20,
        b"[" * 2**20,
        b'{"format":"gearfall","format_version":1,"tensors":' + b"[" * 2**20,
        b'{"format":"gearfall","format_version":1,"x":' + b"9" * 2**20 + b"}",
        b" " * (MAX_MANIFEST_BYTES + 1),
    ],
)
def test_what_is_no_manifest_is_refused_quickly(content: bytes):
    started_s = time.process_time()
    with pytest.raises(CorruptCheckpoint):
        parse_manifest(content)
    # Processor time of a hostile input, far above what it takes and far below what hurts.
    assert time.process_time() - started_s < 1.0


@given(st.data())
def test_mutated_bytes_raise_nothing_else(data: st.DataObject):
    manifest = data.draw(st.sampled_from((sound_manifest(), cut_manifest())))
    content = bytearray(manifest_bytes(manifest))
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 8))
        content[begin : begin + length] = data.draw(st.binary(max_size=8))
    with contextlib.suppress(CorruptCheckpoint):
        parse_manifest(bytes(content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(
    seed=st.integers(0, 2**32),
    value=JSON,
    manifest=st.sampled_from((sound_manifest(), cut_manifest())),
)
def test_any_value_anywhere_raises_nothing_else(seed: int, value: Any, manifest: Manifest):
    broken = json.loads(manifest_bytes(manifest))
    place: Any = broken
    choice = random.Random(seed)
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = choice.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and choice.random() < 0.8:
            place = place[key]
        else:
            break
    place[key] = value
    with contextlib.suppress(CorruptCheckpoint):
        parse_manifest(json.dumps(broken).encode())


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    offset, tensors = 0, []
    names = draw(
        st.lists(st.from_regex(r"[a-z_0-9]{1,12}", fullmatch=True), unique=True, min_size=1)
    )
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        size = DTYPE_BYTES[dtype]
        for length in shape:
            size *= length
        tensors.append(TensorEntry(name, dtype, shape, 0, offset, size))
        offset += -(-size // 256) * 256 + 256 * draw(st.integers(0, 3))
    size_bytes = max(4096, -(-offset // 4096) * 4096)
    chunk_bytes = 4096 * draw(st.integers(1, 4))
    sums = tuple(f"{i:016x}" for i in range(-(-size_bytes // chunk_bytes)))
    partition = PartitionEntry("p.bin", size_bytes, chunk_bytes, sums)
    aliases = (AliasEntry("A", names[0]),) if draw(st.booleans()) else ()
    return Manifest(
        format_version=1,
        model=FACTS,
        partitions=(partition,),
        tensors=tuple(tensors),
        aliases=aliases,
    )


@given(manifests())
def test_every_sound_manifest_survives_the_round_trip(manifest: Manifest):
    assert parse_manifest(manifest_bytes(manifest)) == manifest
