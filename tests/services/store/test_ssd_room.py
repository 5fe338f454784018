"""Room on the SSD tier: who leaves, and when the bytes are gone from the disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gearfall.core.errors import Overloaded
from gearfall.core.ids import ModelName
from services.store.ssd_room import SsdRoom
from services.store.ssd_tier import SsdTier
from tests.services.store.sources import llama_tensors, write_source

A, B, NEW = ModelName("a"), ModelName("b"), ModelName("new")


class Elsewhere:
    """Every model is also somewhere else."""

    def has_others(self, model) -> bool:
        return True

    async def give_up(self, model) -> bool:
        return True


class SmallDisk(SsdTier):
    """A tier on a disk of its own: what its directory takes is not free."""

    disk_bytes = 2**40

    def space(self) -> tuple[int, int]:
        return self.disk_bytes, self.disk_bytes - on_disk_bytes(self)


def on_disk_bytes(tier: SsdTier) -> int:
    return sum(file.stat().st_size for file in tier._models_dir.rglob("partition-*"))


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[SmallDisk]:
    found = SmallDisk(tmp_path / "data")
    found.open()
    for seed, name in enumerate((A, B)):
        source = write_source(tmp_path / name, llama_tensors(seed))
        found.register(name, str(source), lambda done, total: None)
    yield found
    found.close()


def room(tier: SsdTier, capacity_bytes: int) -> SsdRoom:
    return SsdRoom(
        capacity_bytes,
        tier,
        Elsewhere(),
        is_busy=lambda _: False,
        expected_use=lambda name: 1.0 if name == A else 2.0,
        bandwidth=lambda: 1e9,
    )


async def test_evicted_bytes_leave_the_disk_behind_the_fetch(tier: SmallDisk):
    size_bytes = tier.get(A).manifest.size_bytes
    both_bytes = on_disk_bytes(tier)
    books = room(tier, 2 * size_bytes)
    await books.reserve(NEW, size_bytes)
    assert A not in tier.models
    assert books.used_bytes == 2 * size_bytes
    assert on_disk_bytes(tier) == both_bytes
    books.release(NEW)
    await books.stop()
    assert on_disk_bytes(tier) == both_bytes // 2
    assert books.used_bytes == size_bytes


async def test_a_disk_without_room_for_both_is_emptied_first(tier: SmallDisk):
    size_bytes = tier.get(A).manifest.size_bytes
    both_bytes = on_disk_bytes(tier)
    tier.disk_bytes = both_bytes + size_bytes // 2
    books = room(tier, 0)
    await books.reserve(NEW, size_bytes)
    assert on_disk_bytes(tier) == both_bytes // 2
    assert set(tier.models) == {B}
    await books.reserve(ModelName("other"), size_bytes // 2)
    assert set(tier.models) == {B}


async def test_trash_of_a_fetch_under_way_is_removed_before_a_model_is(tier: SmallDisk):
    size_bytes = tier.get(A).manifest.size_bytes
    tier.disk_bytes = on_disk_bytes(tier) + 2 * size_bytes
    books = room(tier, 2 * size_bytes)
    await books.reserve(NEW, size_bytes)
    tier.disk_bytes = on_disk_bytes(tier)
    books.release(NEW)
    await books.reserve(NEW, size_bytes)
    assert set(tier.models) == {B}


async def test_what_cannot_leave_is_said(tier: SmallDisk):
    size_bytes = tier.get(A).manifest.size_bytes
    books = room(tier, 3 * size_bytes)
    await books.reserve(NEW, 3 * size_bytes)
    with pytest.raises(Overloaded, match="no room"):
        await books.reserve(ModelName("other"), size_bytes)
