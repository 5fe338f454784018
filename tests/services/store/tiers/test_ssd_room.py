"""Room on the SSD tier: who leaves, and when the bytes are gone from the disk."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearfall.core.errors import Overloaded
from gearfall.core.ids import ModelName
from services.store.tiers.ssd_room import SsdRoom
from services.store.tiers.ssd_tier import SsdTier
from tests.services.store.source_directories import llama_tensors, write_source

A, B, NEW = ModelName("a"), ModelName("b"), ModelName("new")
TIMEOUT_S = 30.0


class Elsewhere:
    """Every model is also somewhere else, as far as is known; of `held` it turns out otherwise."""

    def __init__(self, held: frozenset[ModelName] = frozenset()) -> None:
        self._held = held

    def has_others(self, model) -> bool:
        return True

    async def give_up(self, model) -> bool:
        return model.name not in self._held


class SmallDisk(SsdTier):
    """A tier on a disk of its own: what its directory takes is not free."""

    disk_bytes = 2**40

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.is_leaving, self.may_leave = threading.Event(), threading.Event()
        self.may_leave.set()

    def set_aside(self, name: ModelName, trash: list[Path]) -> None:
        self.is_leaving.set()
        assert self.may_leave.wait(TIMEOUT_S), "nobody let the model leave"
        super().set_aside(name, trash)

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


def room(tier: SsdTier, capacity_bytes: int, held: frozenset[ModelName] = frozenset()) -> SsdRoom:
    return SsdRoom(
        capacity_bytes,
        tier,
        Elsewhere(held),
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


async def test_a_second_fetch_counts_on_no_room_of_the_first(tier: SmallDisk):
    size_bytes = tier.get(A).manifest.size_bytes
    tier.disk_bytes = on_disk_bytes(tier) + size_bytes + size_bytes // 2
    books = room(tier, 2 * size_bytes)
    for name in (NEW, ModelName("newer")):
        await books.reserve(name, size_bytes)
    assert not tier.models
    assert tier.space()[1] >= books.used_bytes == 2 * size_bytes


async def all_else() -> None:
    """Return when everything that runs behind has ended, and do nothing for it."""
    behind = asyncio.all_tasks() - {asyncio.current_task()}
    if behind:
        await asyncio.wait(behind, timeout=TIMEOUT_S)


async def test_a_refused_fetch_leaves_no_evicted_bytes(tier: SmallDisk):
    size_bytes, both_bytes = tier.get(A).manifest.size_bytes, on_disk_bytes(tier)
    books = room(tier, 2 * size_bytes, held=frozenset({B}))
    with pytest.raises(Overloaded, match="no room"):
        await books.reserve(NEW, 2 * size_bytes)
    assert set(tier.models) == {B}
    await all_else()
    assert on_disk_bytes(tier) == both_bytes // 2


async def test_a_fetch_that_is_cancelled_while_a_model_leaves_loses_none_of_it(tier: SmallDisk):
    size_bytes, both_bytes = tier.get(A).manifest.size_bytes, on_disk_bytes(tier)
    books = room(tier, 2 * size_bytes)
    tier.may_leave.clear()
    reserving = asyncio.create_task(books.reserve(NEW, size_bytes))
    await asyncio.to_thread(tier.is_leaving.wait, TIMEOUT_S)
    reserving.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert books.leaving == {A}
    tier.may_leave.set()
    with pytest.raises(asyncio.CancelledError):
        await reserving
    await all_else()
    assert on_disk_bytes(tier) == both_bytes // 2
    assert (set(tier.models), books.used_bytes) == ({B}, size_bytes)


async def test_what_cannot_leave_is_said(tier: SmallDisk):
    size_bytes = tier.get(A).manifest.size_bytes
    books = room(tier, 3 * size_bytes)
    await books.reserve(NEW, 3 * size_bytes)
    with pytest.raises(Overloaded, match="no room"):
        await books.reserve(ModelName("other"), size_bytes)
