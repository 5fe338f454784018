"""A store that keeps memory ready: sized by what may be loaded next, seen by nobody else."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gearfall.core.ids import ModelName
from gearfall.infra.memory.native import read_chunks
from services.store.tiers.pool_allocator import FreshMemory
from services.store.tiers.spare_memory import SpareMemory
from tests.services.store.checkpoints import many_tensors
from tests.services.store.source_directories import write_source
from tests.services.store.stores import TIMEOUT_S, RunningStore, running_store

MIB = 2**20
A, B = ModelName("a"), ModelName("b")


def spare_of(store: RunningStore) -> SpareMemory:
    assert isinstance(store.service.pool.allocator, SpareMemory)
    return store.service.pool.allocator


async def held_bytes(store: RunningStore) -> int:
    spare = spare_of(store)
    assert await asyncio.to_thread(spare.wait_settled, TIMEOUT_S)
    return spare.held_bytes


def sources(directory: Path, **mebibytes: int) -> dict[str, Path]:
    return {
        name: write_source(directory / f"{name}-source", many_tensors(size, seed=size))
        for name, size in mebibytes.items()
    }


async def test_it_follows_what_may_be_loaded_next(tmp_path: Path):
    paths = sources(tmp_path, a=17, b=19)
    async with running_store(tmp_path / "store") as store:
        assert await held_bytes(store) == 0
        await store.register("a", paths["a"])
        assert await held_bytes(store) == 17 * MIB
        await store.register("b", paths["b"])
        assert await held_bytes(store) == 19 * MIB
        (await store.lease("b")).close()
        assert await held_bytes(store) == 17 * MIB
        (await store.lease("a")).close()
        assert await held_bytes(store) == 0
        store.service.unload("b")
        assert await held_bytes(store) == 19 * MIB
        await store.service.delete("b")
        assert await held_bytes(store) == 0


async def test_it_counts_as_free_room(tmp_path: Path):
    paths = sources(tmp_path, a=17)
    async with running_store(tmp_path / "store") as store:
        await store.register("a", paths["a"])
        assert await held_bytes(store) == 17 * MIB
        assert store.service.describe().dram_used_bytes == 0
        (await store.lease("a")).close()
        assert store.service.describe().dram_used_bytes == 17 * MIB


async def test_it_makes_room_before_any_model_does(tmp_path: Path):
    paths = sources(tmp_path, a=17, b=19)
    async with running_store(tmp_path / "store", dram_bytes=36 * MIB) as store:
        for name, path in paths.items():
            await store.register(name, path)
        await store.load("a")
        assert await held_bytes(store) == 19 * MIB
        await store.load("b")
        assert {resident.model for resident in store.service.pool.residents} == {A, B}
        assert await held_bytes(store) == 0


async def test_it_is_there_again_after_a_restart(tmp_path: Path):
    paths = sources(tmp_path, a=17)
    async with running_store(tmp_path / "store") as store:
        await store.register("a", paths["a"])
    async with running_store(tmp_path / "store") as store:
        assert await held_bytes(store) == 17 * MIB


@pytest.mark.parametrize(("dram_bytes", "held"), [(18 * MIB, 18 * MIB), (16 * MIB, 0)])
async def test_a_model_that_does_not_fit_is_not_waited_for(
    tmp_path: Path, dram_bytes: int, held: int
):
    paths = sources(tmp_path, a=18)
    async with running_store(tmp_path / "store", dram_bytes=dram_bytes) as store:
        await store.register("a", paths["a"])
        assert await held_bytes(store) == held


async def test_it_can_be_turned_off(tmp_path: Path):
    async with running_store(tmp_path / "store", spare_bytes=0) as store:
        assert isinstance(store.service.pool.allocator, FreshMemory)


@pytest.mark.parametrize("spare_bytes", [0, 64 * MIB])
async def test_a_load_reads_into_it(tmp_path: Path, spare_bytes: int):
    paths, faulting_threads = sources(tmp_path, a=17), []

    def read(*args: Any, **options: Any) -> list[int]:
        faulting_threads.append(options["populate_threads"])
        return read_chunks(*args, **options)

    async with running_store(tmp_path / "store", spare_bytes=spare_bytes, read=read) as store:
        await store.register("a", paths["a"])
        if spare_bytes:
            assert await held_bytes(store) == 17 * MIB
        await store.load("a")
    assert [count == 0 for count in faulting_threads] == [spare_bytes > 0]
