"""Registration on disk: the bytes, idempotence, restarts, leftovers, links."""

import contextlib
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearfall.checkpoint.layout import CHUNK_BYTES
from gearfall.core.checkpoint.dtypes import DTYPE_OF_SAFETENSORS
from gearfall.core.checkpoint.manifest import checksum
from gearfall.core.errors import Conflict, CorruptCheckpoint, InvalidRequest, NotFound, Unavailable
from gearfall.core.ids import ModelName
from services.store.tiers.ssd_tier import SsdTier
from services.store.tiers.stored_model import StoredModel
from tests.services.store.source_directories import (
    Tensors,
    llama_tensors,
    random_tensor,
    write_sharded,
    write_source,
)

NAME = ModelName("tiny")


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[SsdTier]:
    tier = SsdTier(tmp_path / "data")
    tier.open()
    yield tier
    tier.close()


def entries(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir()]


def ignore(done_bytes: int, total_bytes: int) -> None:
    pass


def stored_tensors(model: StoredModel) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    content = model.partition_path(0).read_bytes()
    return {
        name: (
            entry.dtype,
            entry.shape,
            content[entry.offset_bytes : entry.offset_bytes + entry.size_bytes],
        )
        for name, entry in model.manifest.tensors_by_name().items()
    }


def expected(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (DTYPE_OF_SAFETENSORS[dtype], shape, content)
        for name, (dtype, shape, content) in tensors.items()
    }


def test_every_dtype_and_shape_arrives_byte_for_byte(tier: SsdTier, tmp_path: Path):
    tensors = llama_tensors() | {
        f"x.{dtype}": random_tensor((3, 2), dtype=dtype)
        for dtype in DTYPE_OF_SAFETENSORS
        if dtype != "F4"
    }
    tensors |= {"scalar": random_tensor(()), "empty": random_tensor((0, 4))}
    model = tier.register(NAME, str(write_source(tmp_path / "src", tensors)), ignore)
    assert stored_tensors(model) == expected(tensors)
    assert tier.get(NAME).read_file("config.json") == (tmp_path / "src/config.json").read_bytes()


def test_a_model_of_several_chunks_has_their_checksums(tier: SsdTier, tmp_path: Path):
    tensors = {f"t{i}": random_tensor((1500, 1024), seed=i) for i in range(3)}
    model = tier.register(NAME, str(write_source(tmp_path / "src", tensors)), ignore)
    content = model.partition_path(0).read_bytes()
    chunks = [content[i : i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES)]
    assert len(chunks) == 3
    assert model.manifest.partitions[0].checksums == tuple(map(checksum, chunks))
    assert stored_tensors(model) == expected(tensors)


def test_shards_are_one_model(tier: SsdTier, tmp_path: Path):
    tensors = llama_tensors()
    names = list(tensors)
    first = {name: tensors[name] for name in names[:2]}
    second = {name: tensors[name] for name in names[2:]}
    source = write_sharded(
        tmp_path / "src", {"model-1.safetensors": first, "model-2.safetensors": second}
    )
    assert stored_tensors(tier.register(NAME, str(source), ignore)) == expected(tensors)


def test_equal_tensors_are_stored_once(tier: SsdTier, tmp_path: Path):
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = write_source(tmp_path / "src", tensors, metadata={"tied": "model.norm.weight"})
    model = tier.register(NAME, str(source), ignore)
    stored = {tensor.name for tensor in model.manifest.tensors}
    assert "lm_head.weight" not in stored
    found = stored_tensors(model)
    assert found.pop("tied") == found["model.norm.weight"]
    assert found == expected(tensors)


def test_progress_ends_at_the_whole(tier: SsdTier, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    model = tier.register(
        NAME, str(write_source(tmp_path / "src")), lambda done, total: seen.append((done, total))
    )
    size = model.manifest.size_bytes
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_same_bytes_again_are_the_same_model(tier: SsdTier, tmp_path: Path):
    first = tier.register(NAME, str(write_source(tmp_path / "one")), ignore)
    inode = first.partition_path(0).stat().st_ino
    assert tier.register(NAME, str(write_source(tmp_path / "two")), ignore) == first
    assert first.partition_path(0).stat().st_ino == inode


def test_other_bytes_under_the_name_conflict(tier: SsdTier, tmp_path: Path):
    tier.register(NAME, str(write_source(tmp_path / "one")), ignore)
    other = str(write_source(tmp_path / "two", llama_tensors(seed=1)))
    with pytest.raises(Conflict):
        tier.register(NAME, other, ignore)
    tier.remove(NAME)
    assert tier.register(NAME, other, ignore).source == other


def test_a_restart_finds_models_and_removes_leftovers(tmp_path: Path):
    tier = SsdTier(tmp_path / "data")
    tier.open()
    model = tier.register(NAME, str(write_source(tmp_path / "src")), ignore)
    half = tmp_path / "data/models/.incoming-other-x"
    half.mkdir()
    (half / "partition-0.bin").write_bytes(bytes(100))
    tier.close()
    again = SsdTier(tmp_path / "data")
    again.open()
    assert again.models == {NAME: model}
    assert entries(tmp_path / "data/models") == [NAME]
    again.close()


@contextlib.contextmanager
def no_further_descriptor() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_was_set_aside_is_told_also_where_the_disk_fails_then(tier: SsdTier, tmp_path: Path):
    """It can be moved and not be synced: for that its directory has to be opened."""
    tier.register(NAME, str(write_source(tmp_path / "src")), ignore)
    trash: list[Path] = []
    with no_further_descriptor(), pytest.raises(Unavailable, match="failed"):
        tier.set_aside(NAME, trash)
    assert [place.name for place in trash] == entries(tmp_path / "data/models")
    assert not tier.models


def test_one_store_at_a_time(tier: SsdTier, tmp_path: Path):
    other = SsdTier(tmp_path / "data")
    with pytest.raises(Conflict, match="another store"):
        other.open()


@pytest.mark.parametrize("damage", ["manifest", "length", "missing"])
def test_a_broken_model_says_so_until_it_is_registered_again(tmp_path: Path, damage: str):
    tier = SsdTier(tmp_path / "data")
    tier.open()
    source = str(write_source(tmp_path / "src"))
    model = tier.register(NAME, source, ignore)
    tier.close()
    if damage == "manifest":
        (model.directory / "manifest.json").write_bytes(b"{")
    elif damage == "length":
        os.truncate(model.partition_path(0), 10)
    else:
        model.partition_path(0).unlink()
    again = SsdTier(tmp_path / "data")
    again.open()
    with pytest.raises(CorruptCheckpoint):
        again.get(NAME)
    assert again.register(NAME, source, ignore).digest == model.digest
    assert again.get(NAME).digest == model.digest
    again.close()


def test_only_listed_and_sound_files_are_read(tier: SsdTier, tmp_path: Path):
    model = tier.register(NAME, str(write_source(tmp_path / "src")), ignore)
    for file in ("manifest.json", "partition-0.bin", "../tiny/config.json", "", "origin.json"):
        with pytest.raises(NotFound):
            tier.get(NAME).read_file(file)
    text = (model.directory / "config.json").read_text()
    (model.directory / "config.json").write_text(text.replace("llama", "LLAMA"))
    with pytest.raises(CorruptCheckpoint):
        tier.get(NAME).read_file("config.json")


def test_a_hugging_face_snapshot_is_followed_into_its_blobs(tier: SsdTier, tmp_path: Path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--name/snapshots" / commit
    blobs = tmp_path / "models--org--name/blobs"
    write_source(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    model = tier.register(NAME, str(snapshot), ignore)
    assert model.manifest.source_revision == commit
    assert tier.register(NAME, str(blobs), ignore) == model


def test_links_that_leave_the_directory_are_refused(tier: SsdTier, tmp_path: Path):
    write_source(tmp_path / "elsewhere")
    source = write_source(tmp_path / "src")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (source / name).rename(source / "kept")
        (source / name).symlink_to(tmp_path / "elsewhere" / name)
        with pytest.raises(InvalidRequest, match="leaves its directory"):
            tier.register(NAME, str(source), ignore)
        (source / name).unlink()
        (source / "kept").rename(source / name)
    (source / "real.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("real.safetensors")
    assert tier.register(NAME, str(source), ignore)


def test_pipes_and_directories_are_not_files(tier: SsdTier, tmp_path: Path):
    source = write_source(tmp_path / "src")
    (source / "tokenizer.json").unlink()
    os.mkfifo(source / "tokenizer.json")
    with pytest.raises(InvalidRequest, match="regular"):
        tier.register(NAME, str(source), ignore)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").mkdir()
    with pytest.raises(InvalidRequest, match="regular"):
        tier.register(NAME, str(source), ignore)


def test_a_source_that_changes_meanwhile_is_refused(tier: SsdTier, tmp_path: Path):
    source = write_source(tmp_path / "src")

    def change(done_bytes: int, total_bytes: int) -> None:
        os.utime(source / "model.safetensors", ns=(done_bytes, done_bytes))

    with pytest.raises(Conflict, match="changed"):
        tier.register(NAME, str(source), change)
    os.truncate(source / "model.safetensors", 2000)
    with pytest.raises(CorruptCheckpoint):
        tier.register(NAME, str(source), ignore)
    assert entries(tmp_path / "data/models") == []


def test_a_failed_disk_leaves_nothing_behind(tier: SsdTier, tmp_path: Path):
    def fail(done_bytes: int, total_bytes: int) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(Unavailable):
        tier.register(NAME, str(write_source(tmp_path / "src")), fail)
    assert entries(tmp_path / "data/models") == []
    assert tier.models == {}


def test_a_chat_template_is_noticed(tier: SsdTier, tmp_path: Path):
    source = write_source(tmp_path / "src")
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert tier.register(NAME, str(source), ignore).manifest.model.has_chat_template
