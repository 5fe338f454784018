"""Bad checkpoints: each a typed error, nothing left behind, the store alive and serving."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gearfall.core.errors import (
    Conflict,
    CorruptCheckpoint,
    InvalidRequest,
    Overloaded,
)
from tests.services.store.source_directories import (
    CONFIG,
    llama_tensors,
    random_tensor,
    write_sharded,
    write_source,
)
from tests.services.store.stores import RunningStore, running_store

MAX_GROWTH_KIB = 64 * 1024


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[RunningStore]:
    async with running_store(tmp_path / "store", dram_bytes=2**20) as store:
        yield store


async def check_alive(store: RunningStore, tmp_path: Path) -> None:
    """A good model registers, loads and is leased; nothing of the bad one is left."""
    models = tmp_path / "store/models"
    before = {entry.name for entry in models.iterdir()}
    assert not any(name.startswith(".") for name in before)
    assert "bad" not in before
    await store.register("good", write_source(tmp_path / "good"))
    with await store.lease("good") as lease:
        assert lease.manifest.tensors
    assert "bad" not in store.cluster.view.models


def weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def truncated(directory: Path) -> None:
    os.truncate(weights(directory), weights(directory).stat().st_size - 1)


def cut_in_the_header(directory: Path) -> None:
    os.truncate(weights(directory), 50)


def cut_in_the_length(directory: Path) -> None:
    os.truncate(weights(directory), 3)


def empty(directory: Path) -> None:
    os.truncate(weights(directory), 0)


def claims_2_to_the_60(directory: Path) -> None:
    with weights(directory).open("r+b") as file:
        file.write(struct.pack("<Q", 2**60))


def huge_sparse_header(directory: Path) -> None:
    with weights(directory).open("r+b") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**40 + 8)


def trailing_bytes(directory: Path) -> None:
    with weights(directory).open("ab") as file:
        file.write(b"more")


def deep_json(directory: Path) -> None:
    text = b'{"a":' + b"[" * 2**20
    weights(directory).write_bytes(struct.pack("<Q", len(text)) + text)


def overlapping(directory: Path) -> None:
    entry = {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    weights(directory).write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


def negative_offsets(directory: Path) -> None:
    entry = {"dtype": "U8", "shape": [16], "data_offsets": [-16, 0]}
    text = json.dumps({"a": entry}).encode()
    weights(directory).write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


def no_tensors(directory: Path) -> None:
    weights(directory).write_bytes(struct.pack("<Q", 2) + b"{}")


def config_not_json(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"\x80\x02}q\x00.")


def config_deep(directory: Path) -> None:
    (directory / "config.json").write_bytes(b'{"a":' + b"[" * 2**19)


def index_outside(directory: Path) -> None:
    weights(directory).rename(directory.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(llama_tensors(), "../outside.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_lies(directory: Path) -> None:
    weights(directory).unlink()
    write_sharded(directory, {"model-1.safetensors": llama_tensors()})
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors", "x": "model-1.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_missing(directory: Path) -> None:
    weights(directory).unlink()
    write_sharded(directory, {"model-1.safetensors": llama_tensors()})
    (directory / "model-1.safetensors").unlink()


def tensor_in_two_shards(directory: Path) -> None:
    weights(directory).unlink()
    a, b, c = (random_tensor((4, 4), seed=seed) for seed in range(3))
    write_sharded(
        directory, {"m-1.safetensors": {"a": a, "b": b}, "m-2.safetensors": {"a": a, "c": c}}
    )


CORRUPT: list[Callable[[Path], None]] = [
    truncated,
    cut_in_the_header,
    cut_in_the_length,
    empty,
    claims_2_to_the_60,
    huge_sparse_header,
    trailing_bytes,
    deep_json,
    overlapping,
    negative_offsets,
    no_tensors,
    config_not_json,
    config_deep,
    index_outside,
    index_lies,
    shard_missing,
    tensor_in_two_shards,
]


@pytest.mark.parametrize("damage", CORRUPT, ids=[damage.__name__ for damage in CORRUPT])
async def test_corrupt_sources(store: RunningStore, tmp_path: Path, damage: Callable[[Path], None]):
    source = write_source(tmp_path / "bad")
    damage(source)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCheckpoint):
        await store.register("bad", source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < MAX_GROWTH_KIB
    await check_alive(store, tmp_path)


def pickle_only(directory: Path) -> None:
    weights(directory).rename(directory / "pytorch_model.bin")


def torch_file_only(directory: Path) -> None:
    weights(directory).rename(directory / "model.pt")


def no_weights(directory: Path) -> None:
    weights(directory).unlink()


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def remote_code(directory: Path) -> None:
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_evil.py").write_text("raise SystemExit('executed')")


def not_a_language_model(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["BertModel"]}))


def huge_config(directory: Path) -> None:
    with (directory / "config.json").open("ab") as file:
        file.truncate(2**40)


def link_to_a_secret(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("/etc/hostname")


def link_to_nowhere(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("nowhere")


def link_to_itself(directory: Path) -> None:
    weights(directory).unlink()
    weights(directory).symlink_to("model.safetensors")


def pipe(directory: Path) -> None:
    weights(directory).unlink()
    os.mkfifo(weights(directory))


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (pickle_only, "convert it to safetensors"),
    (torch_file_only, "convert it to safetensors"),
    (no_weights, "model.safetensors"),
    (no_config, "config.json"),
    (remote_code, "auto_map"),
    (not_a_language_model, "causal"),
    (huge_config, "larger"),
    (link_to_a_secret, "leaves its directory"),
    (link_to_nowhere, "cannot be read"),
    (link_to_itself, "cannot be read"),
    (pipe, "regular"),
]


@pytest.mark.parametrize(
    ("damage", "complaint"), REFUSED, ids=[damage.__name__ for damage, _ in REFUSED]
)
async def test_refused_sources(
    store: RunningStore, tmp_path: Path, damage: Callable[[Path], None], complaint: str
):
    source = write_source(tmp_path / "bad")
    damage(source)
    with pytest.raises(InvalidRequest, match=complaint):
        await store.register("bad", source)
    await check_alive(store, tmp_path)


@pytest.mark.parametrize(
    "name", ["../bad", "..", "", "a/b", "Bad", "bad\0", "a" * 97, ".incoming-x", "bad..x"]
)
async def test_bad_names(store: RunningStore, tmp_path: Path, name: str):
    with pytest.raises(InvalidRequest):
        await store.register(name, write_source(tmp_path / "bad"))
    await check_alive(store, tmp_path)


@pytest.mark.parametrize("path", ["", "relative", "/nonexistent", "/etc/passwd", "/tmp/a\0b"])
async def test_bad_paths(store: RunningStore, tmp_path: Path, path: str):
    with pytest.raises(InvalidRequest):
        await store.register("bad", path)
    await check_alive(store, tmp_path)


async def test_a_model_larger_than_the_pool(store: RunningStore, tmp_path: Path):
    tensors = {"big": random_tensor((2**21,), dtype="U8")}
    await store.register("big", write_source(tmp_path / "big", tensors))
    with pytest.raises(InvalidRequest, match="--dram-bytes"):
        await store.load("big")
    await check_alive(store, tmp_path)


async def test_a_pool_full_of_leases(store: RunningStore, tmp_path: Path):
    for seed, name in enumerate(("one", "two")):
        tensors = {"x": random_tensor((600_000,), dtype="U8", seed=seed)}
        await store.register(name, write_source(tmp_path / name, tensors))
    with await store.lease("one"), pytest.raises(Overloaded):
        await store.load("two")
    await check_alive(store, tmp_path)


async def test_bytes_that_rot_on_disk(store: RunningStore, tmp_path: Path):
    source = write_source(tmp_path / "rotten")
    await store.register("rotten", source)
    path = tmp_path / "store/models/rotten/partition-0.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="chunk 0"):
        await store.load("rotten")
    with pytest.raises(CorruptCheckpoint, match="chunk 0"):
        await store.load("rotten")
    await store.wait_model("rotten", ())
    await store.register("rotten", source)
    await store.load("rotten")
    await check_alive(store, tmp_path)


async def test_two_directories_race_for_a_name(store: RunningStore, tmp_path: Path):
    one = write_source(tmp_path / "one")
    two = write_source(tmp_path / "two", llama_tensors(seed=1))
    first = store.service.register("raced", str(one))
    second = store.service.register("raced", str(two))
    assert (await first.wait()).source == str(one)
    with pytest.raises(Conflict):
        await second.wait()
    await check_alive(store, tmp_path)


FULL_DISK = """
import sys
from pathlib import Path
from gearfall.core.errors import Overloaded
from services.store.tiers.ssd_tier import SsdTier

disk, good, *bad = map(Path, sys.argv[1:])
tier = SsdTier(disk)
tier.open()
for source in bad:
    try:
        tier.register("bad", str(source), lambda done, total: None)
    except Overloaded as error:
        print(error)
    else:
        sys.exit(f"no error for {source}")
    assert [entry.name for entry in (disk / "models").iterdir()] == []
tier.register("good", str(good), lambda done, total: None)
assert tier.get("good")
"""


def test_a_full_disk(tmp_path: Path):
    """On a real file system of 256 KiB, in a mount namespace of its own."""
    unshare = shutil.which("unshare")
    probe = [unshare or "unshare", "--user", "--map-root-user", "--mount"]
    if unshare is None or subprocess.run([*probe, "true"], check=False).returncode != 0:
        pytest.skip("no user namespaces here: a small file system can't be mounted")
    tensors = {"x": random_tensor((2**19,), dtype="U8")}
    large_tokenizer = write_source(tmp_path / "large-tokenizer")
    (large_tokenizer / "tokenizer.json").write_bytes(bytes(2**19))
    sources = [
        write_source(tmp_path / "good"),
        write_source(tmp_path / "large-tensors", tensors),
        large_tokenizer,
    ]
    disk = tmp_path / "disk"
    disk.mkdir()
    mount_and_run = 'mount -t tmpfs -o size=256k tmpfs "$1" && shift && exec "$@"'
    command: list[str | Path] = [*probe, "sh", "-c", mount_and_run, "sh", disk]
    command += [sys.executable, "-c", FULL_DISK, disk, *sources]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("no room") == 2
