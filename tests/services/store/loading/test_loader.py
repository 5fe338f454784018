"""Loads: single flight, priority, verification, failure, stop."""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from gearfall.core.errors import (
    CorruptCheckpoint,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from gearfall.core.ids import ModelName
from gearfall.core.tiers import Tier
from gearfall.infra.memory.native import read_chunks
from services.store.loading.loader import Loader
from services.store.tiers.pool import Pool
from services.store.tiers.ssd_tier import SsdTier
from tests.services.store.source_directories import llama_tensors, random_tensor, write_source

A, B, C = ModelName("a"), ModelName("b"), ModelName("c")
DEADLINE_S = 10.0


class GatedReader:
    """The native reader behind a gate that a test opens; counts and orders its reads."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.paths: list[str] = []

    def __call__(self, path: str | os.PathLike[str], **range_: Any) -> list[int]:
        self.paths.append(Path(path).parent.name)
        self.started.release()
        assert self.gate.wait(DEADLINE_S)
        return read_chunks(path, **range_)


@pytest.fixture
def ssd(tmp_path: Path) -> Iterator[SsdTier]:
    tier = SsdTier(tmp_path / "data")
    tier.open()
    for seed, name in enumerate((A, B, C)):
        source = write_source(tmp_path / name, llama_tensors(seed))
        tier.register(name, str(source), lambda done, total: None)
    yield tier
    tier.close()


@contextlib.asynccontextmanager
async def running(loader: Loader) -> AsyncIterator[None]:
    task = asyncio.create_task(loader.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def test_a_load_ends_verified_in_the_pool(ssd: SsdTier):
    pool = Pool(2**20)
    loader = Loader(ssd, pool, read_chunks)
    async with running(loader):
        loaded = await loader.load(A).wait()
    resident = pool.get(A)
    assert resident is not None
    assert loaded.digest == resident.digest == ssd.get(A).digest
    assert loaded.timeline.from_tier is Tier.SSD
    content = os.pread(resident.partition_fds[0], resident.size_bytes, 0)
    assert content == ssd.get(A).partition_path(0).read_bytes()
    with pytest.raises(OSError, match=r"not permitted|Bad file descriptor"):
        os.pwrite(resident.partition_fds[0], b"x", 0)
    pool.close()


async def test_many_who_ask_share_one_load(ssd: SsdTier):
    pool, reader = Pool(2**20), GatedReader()
    loader = Loader(ssd, pool, reader)
    async with running(loader):
        flights = [loader.load(A) for _ in range(500)]
        waits = [asyncio.create_task(flight.wait()) for flight in flights]
        await asyncio.to_thread(reader.started.acquire)
        assert loader.is_loading(A)
        assert loader.queued_bytes_of(is_far=False) == ssd.get(A).manifest.size_bytes
        late = loader.load(A)
        reader.gate.set()
        results = {(await wait).digest for wait in waits} | {(await late.wait()).digest}
        again = await loader.load(A).wait()
    assert results == {again.digest}
    assert reader.paths == [A]
    assert again.timeline.from_tier is Tier.DRAM
    assert loader.queued_bytes_of(is_far=False) == 0
    pool.close()


async def test_progress_reaches_every_follower(ssd: SsdTier):
    pool = Pool(2**20)
    loader = Loader(ssd, pool, read_chunks)

    async def follow() -> list[int]:
        return [progress.done_bytes async for progress in loader.load(A).follow()]

    async with running(loader):
        first, second = await asyncio.gather(follow(), follow())
    size = ssd.get(A).manifest.size_bytes
    assert first[0] == second[0] == 0
    assert first[-1] == second[-1] == size
    pool.close()


async def test_the_highest_priority_goes_first(ssd: SsdTier):
    pool, reader = Pool(2**20), GatedReader()
    loader = Loader(ssd, pool, reader)
    async with running(loader):
        first = loader.load(A)
        await asyncio.to_thread(reader.started.acquire)
        waiting = [loader.load(B, priority=-1), loader.load(C)]
        assert loader.load(B, priority=5) is waiting[0]
        reader.gate.set()
        for flight in (first, *waiting):
            await flight.wait()
    assert reader.paths == [A, B, C]
    pool.close()


@pytest.mark.parametrize("leader_s", [100.0, 1e11], ids=["behind", "ahead"])
async def test_of_one_priority_the_one_wanted_longest_goes_first(ssd: SsdTier, leader_s: float):
    """Requests of two workers may cross on their way; the leader's order is what it predicted,
    however its clock differs from this node's."""
    pool, reader = Pool(2**20), GatedReader()
    loader = Loader(ssd, pool, reader)
    async with running(loader):
        first = loader.load(A)
        await asyncio.to_thread(reader.started.acquire)
        waiting = [
            loader.load(B, wanted_unix_s=leader_s + 0.5),
            loader.load(C, wanted_unix_s=leader_s),
        ]
        reader.gate.set()
        for flight in (first, *waiting):
            await flight.wait()
    assert reader.paths == [A, C, B]
    pool.close()


async def test_who_joins_a_load_later_may_have_wanted_it_for_longer(ssd: SsdTier):
    pool, reader = Pool(2**20), GatedReader()
    loader = Loader(ssd, pool, reader)
    async with running(loader):
        first = loader.load(A)
        await asyncio.to_thread(reader.started.acquire)
        waiting = [loader.load(B, wanted_unix_s=100.5), loader.load(C)]
        assert loader.load(C, wanted_unix_s=100.0) is waiting[1]
        loader.load(C)
        reader.gate.set()
        for flight in (first, *waiting):
            await flight.wait()
    assert reader.paths == [A, C, B]
    pool.close()


async def test_a_flipped_bit_is_found_and_the_model_marked(ssd: SsdTier):
    path = ssd.get(A).partition_path(0)
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    pool, broken = Pool(2**20), asyncio.Event()
    loader = Loader(ssd, pool, read_chunks, on_broken=broken.set)
    async with running(loader):
        with pytest.raises(CorruptCheckpoint, match="chunk 0"):
            await loader.load(A).wait()
        assert broken.is_set()
        with pytest.raises(CorruptCheckpoint):
            loader.load(A)
        await loader.load(B).wait()
    assert pool.get(A) is None
    pool.check()
    pool.close()


async def test_every_flipped_chunk_is_named(tmp_path: Path):
    ssd = SsdTier(tmp_path / "data")
    ssd.open()
    tensors = {"x": random_tensor((5 * 2**20,), dtype="U8"), "y": random_tensor((7,), dtype="U8")}
    ssd.register(A, str(write_source(tmp_path / "src", tensors)), lambda done, total: None)
    path = ssd.get(A).partition_path(0)
    sound = path.read_bytes()
    for index, offset in enumerate((4 * 2**20 - 1, len(sound) - 1)):
        path.write_bytes(sound[:offset] + bytes([sound[offset] ^ 0x80]) + sound[offset + 1 :])
        stored = ssd.get(A)
        loader = Loader(ssd, Pool(2**24), read_chunks)
        async with running(loader):
            with pytest.raises(CorruptCheckpoint, match=f"chunk {index} "):
                await loader.load(A).wait()
        del ssd.broken[A]
        ssd.models[A] = stored
    ssd.close()


async def test_a_truncated_partition_is_corrupt(ssd: SsdTier):
    os.truncate(ssd.get(A).partition_path(0), 100)
    loader = Loader(ssd, Pool(2**20), read_chunks)
    async with running(loader):
        with pytest.raises(CorruptCheckpoint):
            await loader.load(A).wait()


async def test_refusals_leave_the_loader_working(ssd: SsdTier):
    size = ssd.get(A).manifest.size_bytes
    pool = Pool(size)
    loader = Loader(ssd, pool, read_chunks)
    async with running(loader):
        with pytest.raises(NotFound):
            loader.load(ModelName("nobody"))
        await loader.load(A).wait()
        pool.lease(A, ssd.get(A).digest, "worker")
        with pytest.raises(Overloaded):
            await loader.load(B).wait()
        pool.release(A, "worker")
        await loader.load(B).wait()
        assert pool.get(A) is None
    pool.close()
    small = Loader(ssd, Pool(size - 1), read_chunks)
    async with running(small):
        with pytest.raises(InvalidRequest):
            await small.load(A).wait()


async def test_a_failing_disk_is_unavailable_not_corrupt(ssd: SsdTier):
    def fail(path: str | os.PathLike[str], **range_: Any) -> list[int]:
        raise OSError(5, "Input/output error")

    loader = Loader(ssd, Pool(2**20), fail)
    async with running(loader):
        with pytest.raises(Unavailable, match="Input/output"):
            await loader.load(A).wait()
    assert A in ssd.models


async def test_stop_ends_what_waits(ssd: SsdTier):
    reader = GatedReader()
    pool = Pool(2**20)
    loader = Loader(ssd, pool, reader)
    async with running(loader):
        flights = [loader.load(A), loader.load(B)]
        await asyncio.to_thread(reader.started.acquire)
        loader.stop()
        for flight in flights:
            with pytest.raises(Unavailable):
                await flight.wait()
        with pytest.raises(Unavailable):
            loader.load(C)
        reader.gate.set()
