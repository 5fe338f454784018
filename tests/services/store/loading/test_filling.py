"""Memory that is handed out while a load fills it: what a holder sees, and how it ends."""

import asyncio
import contextlib
import errno
import mmap
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from gearfall.core.errors import Conflict, CorruptCheckpoint, NotFound, Unavailable
from gearfall.core.ids import ModelName
from gearfall.infra.memory.attach_protocol import FillNews
from gearfall.infra.memory.pool_lease import PoolLease, map_partition, take_lease
from gearfall.pb import store_pb2 as pb
from services.worker.engine.starting.arrival import LoadNews
from tests.services.store.checkpoints import many_tensors
from tests.services.store.held_reads import HeldReads
from tests.services.store.source_directories import write_source
from tests.services.store.stores import RunningStore, running_store

MODEL, OTHER = ModelName("m"), ModelName("other")
CHUNK = 4 << 20


@contextlib.asynccontextmanager
async def held_store(directory: Path, *names: str) -> AsyncIterator[tuple[RunningStore, HeldReads]]:
    reads = HeldReads()
    async with running_store(directory / "data", read=reads) as store:
        for seed, name in enumerate(names or (MODEL,)):
            source = write_source(directory / name, many_tensors(13, seed=20 * seed))
            await store.register(name, source)
        try:
            yield store, reads
        finally:
            reads.may_go_on.set()


async def lease_early(
    store: RunningStore, model: ModelName = MODEL, *, priority: int = 0
) -> PoolLease:
    """Begin a load and take a lease as soon as the store offers one."""
    request = pb.LoadModelRequest(model=MODEL, priority=priority)
    call = store.stub.LoadModel(request, timeout=20.0)
    async for progress in call:
        assert not progress.done
        if progress.attach_socket:
            call.cancel()
            return await take_lease(
                progress.attach_socket, MODEL, progress.digest, "early", accepts_filling=True
            )
    raise AssertionError("the store offered no lease")


async def until(holds: Callable[[], object]) -> None:
    """Let the store's tasks go on, in this same loop, until it holds."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 (nobody publishes it, and the loop is the store's)
            await asyncio.sleep(0)


@contextlib.contextmanager
def news_of(lease: PoolLease) -> Iterator[LoadNews]:
    assert lease.news_fd is not None
    with contextlib.closing(LoadNews(socket.socket(fileno=os.dup(lease.news_fd)))) as news:
        yield news


def write_anew(fd: int) -> int | None:
    """Try to write by way of /proc; return the error's number."""
    try:
        writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.errno
    try:
        os.pwrite(writable, b"x", 0)
    except OSError as error:
        return error.errno
    finally:
        os.close(writable)
    return None


def stored_bytes(directory: Path, model: str = MODEL) -> bytes:
    return (directory / "data/models" / model / "partition-0.bin").read_bytes()


async def test_a_holder_sees_what_is_verified_and_then_the_rest(tmp_path: Path):
    async with held_store(tmp_path) as (store, reads):
        with await lease_early(store) as lease, news_of(lease) as news:
            whole = stored_bytes(tmp_path)
            mapping = map_partition(lease.partition_fds[0], lease.partition_sizes[0])
            await asyncio.to_thread(news.wait, {0: CHUNK})
            assert mapping[:CHUNK] == whole[:CHUNK]
            assert store.service.pool.get(MODEL) is None
            reads.may_go_on.set()
            await asyncio.to_thread(news.wait, {0: len(whole)})
            assert mapping[:] == whole
            await asyncio.to_thread(news.wait_done)
            assert store.service.pool.holders(MODEL) == ("early",)
            store.service.pool.check()


async def test_nobody_can_write_to_what_was_handed_out(tmp_path: Path):
    async with held_store(tmp_path) as (store, reads):
        with await lease_early(store) as lease, news_of(lease) as news:
            (fd,) = lease.partition_fds
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(fd, CHUNK, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            reads.may_go_on.set()
            await asyncio.to_thread(news.wait_done)
            assert write_anew(fd) in {errno.EROFS, errno.EPERM, errno.EACCES}


async def test_a_client_that_wants_a_resident_model_waits_for_it(tmp_path: Path):
    async with held_store(tmp_path) as (store, reads):
        with await lease_early(store) as early, news_of(early) as news:
            path, digest = str(store.service.attach.path), store.service.ssd.get(MODEL).digest
            with pytest.raises(Unavailable, match="not in the DRAM pool"):
                await take_lease(path, MODEL, digest, "late")
            reads.may_go_on.set()
            await asyncio.to_thread(news.wait_done)
            with await take_lease(path, MODEL, digest, "late", accepts_filling=True) as late:
                assert late.news_fd is None


async def test_a_corrupt_chunk_behind_a_good_one_ends_the_holders_load(tmp_path: Path):
    async with held_store(tmp_path) as (store, reads):
        content = bytearray(stored_bytes(tmp_path))
        content[-100] ^= 1
        (tmp_path / "data/models" / MODEL / "partition-0.bin").write_bytes(content)
        with await lease_early(store) as lease, news_of(lease) as news:
            reads.may_go_on.set()
            with pytest.raises(CorruptCheckpoint, match="chunk 3 is not what was expected"):
                await asyncio.to_thread(news.wait_done)
            with pytest.raises(CorruptCheckpoint):
                await store.load(MODEL)
            assert store.service.pool.used_bytes == 0
            assert store.service.loader.filling_of(MODEL) is None


async def test_a_prefetch_that_gives_way_tells_its_holder_and_starts_over(tmp_path: Path):
    async with held_store(tmp_path, MODEL, OTHER) as (store, reads):
        with await lease_early(store, priority=-1) as lease, news_of(lease) as news:
            demanded = asyncio.ensure_future(store.load(OTHER))
            overtaken = store.service.loader._loads[MODEL]
            await until(overtaken.gives_up.is_set)
            reads.may_go_on.set()
            with pytest.raises(Unavailable, match="gave way"):
                await asyncio.to_thread(news.wait_done)
            assert (await demanded)[-1].done
        assert (await store.load(MODEL))[-1].done
        assert store.service.pool.holders(MODEL) == ()


async def test_unloading_and_deleting_race_a_filling_lease(tmp_path: Path):
    async with held_store(tmp_path) as (store, reads):
        lease = await lease_early(store)
        with pytest.raises(NotFound, match="not in the DRAM pool"):
            await store.call("UnloadModel", pb.UnloadModelRequest(model=MODEL))
        with pytest.raises(Conflict, match="being loaded"):
            await store.call("DeleteModel", pb.DeleteModelRequest(model=MODEL))
        reads.may_go_on.set()
        assert (await store.load(MODEL))[-1].done
        # No step lies between the two states in which the model could have been dropped.
        with pytest.raises(Conflict, match="in use by early"):
            await store.call("UnloadModel", pb.UnloadModelRequest(model=MODEL))
        lease.close()
        await until(lambda: not store.service.pool.holders(MODEL))
        freed = await store.call("UnloadModel", pb.UnloadModelRequest(model=MODEL))
        assert freed.freed_bytes == len(stored_bytes(tmp_path))


async def test_a_holder_that_goes_away_does_not_disturb_the_load(tmp_path: Path):
    async with held_store(tmp_path) as (store, reads):
        (await lease_early(store)).close()
        with await lease_early(store) as second, news_of(second) as news:
            reads.may_go_on.set()
            await asyncio.to_thread(news.wait_done)
        await until(lambda: not store.service.pool.holders(MODEL))
        store.service.pool.check()


async def test_a_store_that_stops_tells_its_holders(tmp_path: Path):
    async with held_store(tmp_path) as (store, reads):
        with await lease_early(store) as lease, news_of(lease) as news:
            store.service.loader.stop()
            reads.may_go_on.set()
            with pytest.raises(Unavailable, match="gave way"):
                await asyncio.to_thread(news.wait_done)


async def test_news_come_in_any_portions_and_end_in_words():
    ours, theirs = socket.socketpair()
    news = LoadNews(theirs)
    body = msgspec.json.encode(FillNews((5, 7)))
    frame = len(body).to_bytes(4, "little") + body
    for at in range(len(frame)):
        ours.send(frame[at : at + 1])
    news.wait({0: 5, 1: 7})
    ours.send(frame[:3])
    ours.close()
    with pytest.raises(Unavailable, match="went away"):
        news.wait({1: 8})
    news.close()
    news.close()
