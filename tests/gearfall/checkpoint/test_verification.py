"""Every damage is found and named: each chunk, each file."""

import os
from pathlib import Path

import pytest

from gearfall.checkpoint.layout import CHUNK_BYTES
from gearfall.checkpoint.reading import open_checkpoint
from gearfall.checkpoint.verification import Verification, verify
from gearfall.core.errors import CorruptCheckpoint
from tests.gearfall.checkpoint.conversions import LLAMA, convert_source, llama_weights, save_source
from tests.services.store.source_directories import random_tensor, write_source

MIB = 2**20


def ignore(done_bytes: int, total_bytes: int) -> None:
    pass


def check(directory: Path) -> Verification:
    return verify(open_checkpoint(directory), ignore)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a partition of 13 MiB in four chunks."""
    home = tmp_path_factory.mktemp("large")
    tensors = {f"t{i}": random_tensor((13, MIB // 4), dtype="U8", seed=i) for i in range(4)}
    return convert_source(write_source(home / "source", tensors), home / "converted").directory


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint of two ranks."""
    source = save_source(tmp_path / "source", llama_weights(), LLAMA)
    return convert_source(source, tmp_path / "converted", 2).directory


def flip(path: Path, offset_bytes: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        (byte,) = file.read(1)
        file.seek(offset_bytes)
        file.write(bytes([byte ^ 1 << offset_bytes % 8]))


def test_a_sound_one_has_no_damage(small: Path):
    found = check(small)
    assert found.damages == ()
    assert (found.chunks, found.files) == (2, 2)
    found.check()


@pytest.mark.parametrize("mib", range(13))
def test_a_flipped_bit_in_any_mib_is_found_where_it_is(large: Path, mib: int):
    partition = large / "partition-0.bin"
    offset_bytes = mib * MIB + (mib * 77_773) % MIB
    flip(partition, offset_bytes)
    try:
        (damage,) = check(large).damages
    finally:
        flip(partition, offset_bytes)
    assert (damage.file, damage.chunk) == (partition.name, offset_bytes // CHUNK_BYTES)
    assert damage.offset_bytes <= offset_bytes < damage.offset_bytes + damage.size_bytes


def test_damages_everywhere_are_all_named(large: Path):
    partition = large / "partition-0.bin"
    for mib in range(13):
        flip(partition, mib * MIB)
    try:
        found = check(large)
    finally:
        for mib in range(13):
            flip(partition, mib * MIB)
    assert [damage.chunk for damage in found.damages] == [0, 1, 2, 3]
    with pytest.raises(CorruptCheckpoint, match=r"chunk 0 .*chunk 3 "):
        found.check()
    assert check(large).damages == ()


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 13 * MIB - 1])
def test_a_truncated_partition_says_how_long_it_is(large: Path, size_bytes: int):
    partition = large / "partition-0.bin"
    content = partition.read_bytes()
    os.truncate(partition, size_bytes)
    try:
        (damage,) = check(large).damages
    finally:
        partition.write_bytes(content)
    assert damage.chunk is None
    assert f"{size_bytes} bytes" in damage.problem


def test_a_partition_that_goes_on_is_damaged_too(small: Path):
    with (small / "partition-1.bin").open("ab") as file:
        file.write(b"more")
    (damage,) = check(small).damages
    assert "not" in damage.problem
    assert damage.file == "partition-1.bin"


def test_files_that_are_missing_links_or_changed(small: Path, tmp_path: Path):
    (small / "partition-0.bin").rename(tmp_path / "kept")
    (small / "partition-0.bin").symlink_to(tmp_path / "kept")
    (small / "partition-1.bin").unlink()
    (small / "config.json").write_text("{}")
    (small / "source-headers.bin").unlink()
    os.mkfifo(small / "source-headers.bin")
    found = check(small)
    assert {damage.file for damage in found.damages} == {
        "partition-0.bin",
        "partition-1.bin",
        "config.json",
        "source-headers.bin",
    }
    with pytest.raises(CorruptCheckpoint):
        found.check()


def test_progress_never_goes_back_and_ends_at_the_whole(large: Path):
    seen: list[tuple[int, int]] = []
    verify(open_checkpoint(large), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (13 * MIB, 13 * MIB)
