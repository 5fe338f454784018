"""Hostile manifests and files of a checkpoint: a typed error, no work done, memory as before.

Each through the doors that others use: opening, verifying, planning and exporting in the library,
the commands, and a store that finds the directory at its start.
"""

import contextlib
import json
import os
import resource
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gearfall.checkpoint.export import export
from gearfall.checkpoint.reading import open_checkpoint
from gearfall.checkpoint.reshard import plan_rank
from gearfall.checkpoint.shard_index import parse_shard_index
from gearfall.checkpoint.verification import verify
from gearfall.cli.main import app
from gearfall.core.checkpoint.manifest import MAX_MANIFEST_BYTES, parse_manifest
from gearfall.core.checkpoint.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, parse_header
from gearfall.core.errors import CorruptCheckpoint, GearfallError
from gearfall.core.ids import ModelName
from services.store.tiers.ssd_tier import SsdTier
from tests.gearfall.checkpoint.conversions import LLAMA, convert_source, llama_weights, save_source

MAX_GROWTH_BYTES = 64 * 2**20
Document = dict[str, Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, with tied tensors, as every test damages a copy of it."""
    home = tmp_path_factory.mktemp("sound")
    weights = llama_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    source = save_source(home / "source", weights, LLAMA)
    return convert_source(source, home / "converted", 2).directory


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "models/bad")


def set_at(*path: str | int, to: Any) -> Callable[[Document], None]:
    def damage(document: Document) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return damage


def doubled(document: Document) -> None:
    document["tensors"].insert(1, document["tensors"][0])


def renamed_to_another(document: Document) -> None:
    document["tensors"][1]["name"] = document["tensors"][0]["name"]


def lacks_a_part(document: Document) -> None:
    last = max(i for i, tensor in enumerate(document["tensors"]) if tensor["split"])
    del document["tensors"][last]


def parts_differ_in_dtype(document: Document) -> None:
    last = document["tensors"][-1]
    last["dtype"] = {"bfloat16": "float16"}[last["dtype"]]


def overlapping(document: Document) -> None:
    first, second = document["tensors"][:2]
    second["offset_bytes"] = first["offset_bytes"]


def deep(document: Document) -> None:
    nested: Any = 1
    for _ in range(500):
        nested = [nested]
    document["tensors"][0]["shape"] = nested


SPLIT = ("tensors", 0, "split")
DAMAGES: dict[str, Callable[[Document], None]] = {
    "unknown version": set_at("format_version", to=2),
    "no version": set_at("format_version", to=None),
    "negative offset": set_at("tensors", 1, "offset_bytes", to=-256),
    "overflowing offset": set_at("tensors", 1, "offset_bytes", to=2**64),
    "offset and size that overflow together": set_at("tensors", 1, "offset_bytes", to=2**63 - 256),
    "offset past the end": set_at("tensors", 1, "offset_bytes", to=2**20),
    "overlap": overlapping,
    "huge size": set_at("tensors", 1, "size_bytes", to=2**62),
    "huge shape": set_at("tensors", 1, "shape", to=[2**46, 2**46]),
    "endless shape": set_at("tensors", 1, "shape", to=[1] * 10_000),
    "negative shape": set_at("tensors", 1, "shape", to=[-1]),
    "wrong dtype": set_at("tensors", 1, "dtype", to="float64"),
    "unknown dtype": set_at("tensors", 1, "dtype", to="qint8"),
    "dtype of one part": parts_differ_in_dtype,
    "tensor twice": doubled,
    "name twice": renamed_to_another,
    "part that is missing": lacks_a_part,
    "partition that is none": set_at("tensors", 0, "partition", to=64),
    "huge partition": set_at("partitions", 0, "size_bytes", to=2**46),
    "partition beyond any disk": set_at("partitions", 0, "size_bytes", to=2**63),
    "chunks of a byte": set_at("partitions", 0, "chunk_bytes", to=1),
    "huge chunks": set_at("partitions", 0, "chunk_bytes", to=2**40),
    "no checksums": set_at("partitions", 0, "checksums", to=[]),
    "../ in a partition's name": set_at("partitions", 0, "file", to="../partition-0.bin"),
    "NUL in a partition's name": set_at("partitions", 0, "file", to="partition-0\0.bin"),
    "absolute partition": set_at("partitions", 0, "file", to="/dev/zero"),
    "one partition twice": set_at("partitions", 1, "file", to="partition-0.bin"),
    "../ in a file's name": set_at("files", 0, "name", to="../config.json"),
    "NUL in a file's name": set_at("files", 0, "name", to="\0"),
    "../ in a tensor's name": set_at("tensors", 0, "name", to="../../x"),
    "NUL in a tensor's name": set_at("tensors", 0, "name", to="a\0"),
    "../ in a source's name": set_at("source_files", 0, "name", to="../../model.safetensors"),
    "source that overwrites a file": set_at("source_files", 0, "name", to="config.json"),
    "source of no bytes": set_at("source_files", 0, "size_bytes", to=0),
    "huge header": set_at("source_files", 0, "header_bytes", to=2**31),
    "headers of another length": set_at("source_files", 0, "header_bytes", to=9),
    "alias of itself": set_at("aliases", 0, "target", to="lm_head.weight"),
    "alias of nothing": set_at("aliases", 0, "target", to="nothing"),
    "split along no dimension": set_at(*SPLIT, "dimension", to=2),
    "split along a negative dimension": set_at(*SPLIT, "dimension", to=-1),
    "split into nothing": set_at(*SPLIT, "sections", to=[]),
    "no units": set_at(*SPLIT, "sections", 0, "units", to=0),
    "negative units": set_at(*SPLIT, "sections", 0, "units", to=-2),
    "uneven units": set_at(*SPLIT, "sections", 0, "units", to=7),
    "uneven members": set_at(*SPLIT, "sections", 0, "members", to=5),
    "negative members": set_at(*SPLIT, "sections", 0, "members", to=-1),
    "no length": set_at(*SPLIT, "sections", 0, "length", to=0),
    "huge length": set_at(*SPLIT, "sections", 0, "length", to=2**62),
    "endless sections": set_at(
        *SPLIT, "sections", to=[{"length": 1, "units": 1, "members": 1}] * 10_000
    ),
    "another rank's part": set_at("tensors", 0, "shape", to=[22, 16]),
    "deep JSON": deep,
}


class Growth:
    """Allocations and the peak of the process since the start of a test."""

    def __enter__(self) -> "Growth":
        self._peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start(1)
        return self

    def __exit__(self, *error: object) -> None:
        _, allocated_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        resident_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._peak_kib
        assert allocated_bytes < MAX_GROWTH_BYTES
        assert resident_kib * 1024 < MAX_GROWTH_BYTES


def refuse_everywhere(directory: Path) -> None:
    """Every door refuses the checkpoint with a typed error, and the store goes on."""
    with Growth():
        with pytest.raises(CorruptCheckpoint):
            open_checkpoint(directory)
        for command in ("inspect", "verify", "export"):
            out = [str(directory.parent / "out")] if command == "export" else []
            result = CliRunner().invoke(app, [command, str(directory), *out])
            assert isinstance(result.exception, CorruptCheckpoint), command
        assert not (directory.parent / "out").exists()
        check_store(directory)


def check_store(directory: Path) -> None:
    tier = SsdTier(directory.parents[1])
    tier.open()
    try:
        assert tier.models == {}
        with pytest.raises(CorruptCheckpoint):
            tier.get(ModelName("bad"))
    finally:
        tier.close()


def test_the_sound_one_passes_every_door(copy: Path):
    checkpoint = open_checkpoint(copy)
    assert verify(checkpoint, lambda done, total: None).damages == ()
    for command in ("inspect", "verify"):
        assert CliRunner().invoke(app, [command, str(copy), "--json"]).exit_code == 0


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_hostile_manifests(copy: Path, damage: Callable[[Document], None]):
    document = json.loads((copy / "manifest.json").read_text())
    damage(document)
    (copy / "manifest.json").write_text(json.dumps(document))
    refuse_everywhere(copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"\xff" * 100,
        b"[" * 2**21,
        b'{"format":"gearfall","format_version":1,"model":' + b'{"a":' * 2**20,
        b'{"format":"gearfall","format_version":' + b"9" * 2**21 + b"}",
        b" " * (MAX_MANIFEST_BYTES + 1),
    ],
    ids=["empty", "null", "binary", "deep list", "deep object", "huge number", "too long"],
)
def test_what_is_no_manifest(copy: Path, content: bytes):
    (copy / "manifest.json").write_bytes(content)
    refuse_everywhere(copy)


def test_a_manifest_of_a_tebibyte_is_not_read(copy: Path):
    os.truncate(copy / "manifest.json", 2**40)
    refuse_everywhere(copy)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "device"])
def test_a_manifest_that_is_no_file(copy: Path, kind: str):
    (copy / "manifest.json").rename(copy / "real.json")
    if kind == "pipe":
        os.mkfifo(copy / "manifest.json")
    elif kind == "directory":
        (copy / "manifest.json").mkdir()
    else:
        (copy / "manifest.json").symlink_to("real.json" if kind == "link" else "/dev/zero")
    refuse_everywhere(copy)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "missing", "short", "long"])
def test_partitions_that_are_not_what_they_should_be(copy: Path, kind: str):
    partition = copy / "partition-1.bin"
    if kind in ("short", "long"):
        os.truncate(partition, 4095 if kind == "short" else 2**40)
    else:
        partition.rename(copy / "real.bin")
    if kind == "link":
        partition.symlink_to("real.bin")
    elif kind == "pipe":
        os.mkfifo(partition)
    elif kind == "directory":
        partition.mkdir()
    with Growth():
        checkpoint = open_checkpoint(copy)
        assert [d.file for d in verify(checkpoint, ignore).damages] == [partition.name]
        with pytest.raises(CorruptCheckpoint), checkpoint.open_partitions():
            pass
        (copy / "out").mkdir()
        with pytest.raises(CorruptCheckpoint, match=partition.name):
            export(checkpoint, copy / "out", ignore)
        assert not list((copy / "out").iterdir())


BOMBS: dict[str, tuple[Callable[[Document], None], bytes]] = {
    "tokens": (set_at("model", "eos_token_ids", to=["X"]), b"1,"),
    "checksums": (set_at("partitions", 0, "checksums", to=["X"]), b'"0123456789abcdef",'),
    "lengths": (set_at("tensors", 0, "shape", to=["X"]), b"1,"),
    "sections": (set_at(*SPLIT, "sections", to=["X"]), b'{"length":1,"units":1,"members":1},'),
    "aliases": (set_at("aliases", to=["X"]), b'{"name":"a","target":"a"},'),
    "files": (set_at("files", to=["X"]), b'{"name":"a","size_bytes":1,"checksum":"a"},'),
    "partitions": (set_at("partitions", to=["X"]), b"{},"),
    "unknown": (set_at("later", to=["X"]), b'{"a":[]},'),
}


@pytest.mark.parametrize(("damage", "filling"), BOMBS.values(), ids=BOMBS.keys())
def test_a_long_manifest_does_not_become_large_objects(
    sound: Path, damage: Callable[[Document], None], filling: bytes
):
    document = json.loads((sound / "manifest.json").read_text())
    damage(document)
    text = json.dumps(document).encode()
    count = (MAX_MANIFEST_BYTES - len(text)) // len(filling)
    content = text.replace(b'"X"', (filling * count)[:-1])
    with Growth(), contextlib.suppress(CorruptCheckpoint):
        parse_manifest(content)


def many(entry: str) -> Callable[[], bytes]:
    def build() -> bytes:
        count = (MAX_HEADER_BYTES - 2) // (len(entry) + 12)
        return b"{" + ",".join(f'"{i:08}":{entry}' for i in range(count)).encode() + b"}"

    return build


HEADER_BOMBS: dict[str, Callable[[], bytes]] = {
    "numbers": many("1"),
    "objects": many("{}"),
    "tensors": many('{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'),
    "metadata": lambda: b'{"__metadata__":' + many('""')()[:-20].rpartition(b",")[0] + b"}}",
    "lengths": lambda: b'{"a":{"shape":[' + b"1," * 2**22 + b'1],"dtype":"I8"}}',
    "depth": lambda: b'{"a":' + b"[" * 2**23,
}


@pytest.mark.parametrize("bomb", HEADER_BOMBS.values(), ids=HEADER_BOMBS.keys())
def test_a_long_safetensors_header_does_not_either(bomb: Callable[[], bytes]):
    header = bomb()
    with Growth(), pytest.raises(CorruptCheckpoint):
        parse_header(header, len(header) + LENGTH_BYTES)


@pytest.mark.parametrize("entry", ['"{:07}":"",', '"{:07}":"{:07}.safetensors",', '"{:07}":1,'])
def test_nor_does_a_long_index(entry: str):
    filling = "".join(entry.format(i, i) for i in range(2**24 // len(entry.format(0, 0))))
    text = f'{{"weight_map":{{{filling[:-1]}}}}}'.encode()
    del filling
    with Growth(), pytest.raises(CorruptCheckpoint):
        parse_shard_index(text)


def ignore(done_bytes: int, total_bytes: int) -> None:
    pass


@pytest.mark.parametrize("seed", range(40))
def test_a_manifest_with_bytes_changed_opens_whole_or_not_at_all(copy: Path, seed: int):
    """What is still accepted can be planned, and verification reads no more than there is."""
    content = bytearray((copy / "manifest.json").read_bytes())
    for step in range(3):
        content[(seed * 7919 + step * 104_729) % len(content)] = b'0917-"[]{}ae,.'[
            (seed + step) % 14
        ]
    (copy / "manifest.json").write_bytes(content)
    with Growth():
        try:
            checkpoint = open_checkpoint(copy)
            plan_rank(checkpoint.manifest, 0, 1)
        except GearfallError:
            return
        read_bytes = [0]
        verify(checkpoint, lambda done, total: read_bytes.append(done))
        assert max(read_bytes) <= checkpoint.manifest.size_bytes
