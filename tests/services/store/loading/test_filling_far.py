"""Memory that is handed out while its bytes come from a URL or a neighbour."""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gearfall.core.errors import CorruptCheckpoint, GearfallError
from gearfall.core.generation.canary import Canary, CanaryToken, canary_bytes
from gearfall.core.ids import ModelName
from gearfall.infra.memory.pool_lease import PoolLease, map_partition, take_lease
from gearfall.infra.state.memory_state import MemoryStateServer
from gearfall.pb import common_pb2
from gearfall.pb import store_pb2 as pb
from services.store.models.canary_process import CanaryRequest
from services.store.sources.neighbour import CONNECTIONS
from services.worker.engine.starting.arrival import LoadNews
from tests.gearfall.infra.web_servers import WebServer, web_server
from tests.services.store.checkpoints import many_tensors, write_checkpoint
from tests.services.store.source_directories import write_source
from tests.services.store.stores import TIMEOUT_S, RunningStore, running_store
from tests.services.store.turnstile import Turnstile

NAME = ModelName("m")
CHUNK = 4 << 20
PARTITION = "partition-0.bin"
CANARY = Canary((1, 2), (CanaryToken(3, -0.5, 1.0, 0.001),))


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    write_checkpoint(tmp_path / "model", many_tensors(18))
    return (tmp_path / "model" / PARTITION).read_bytes()


@pytest.fixture
def web(content: bytes, tmp_path: Path) -> Iterator[WebServer]:
    with web_server(tmp_path / "model") as server:
        yield server


@contextlib.asynccontextmanager
async def leased_early(store: RunningStore) -> AsyncIterator[tuple[PoolLease, LoadNews]]:
    """Begin a load and take a lease as soon as the store offers one."""
    call = store.stub.LoadModel(pb.LoadModelRequest(model=NAME), timeout=TIMEOUT_S)
    async for progress in call:
        assert not progress.done
        if progress.attach_socket:
            assert progress.tier == common_pb2.TIER_REMOTE
            break
    call.cancel()
    lease = await take_lease(
        progress.attach_socket, NAME, progress.digest, "early", accepts_filling=True
    )
    with lease:
        assert lease.news_fd is not None
        with contextlib.closing(LoadNews(socket.socket(fileno=os.dup(lease.news_fd)))) as news:
            yield lease, news


async def wait_for_front(news: LoadNews, size_bytes: int) -> None:
    await asyncio.to_thread(news.wait, {0: size_bytes})


def mapped(lease: PoolLease) -> memoryview:
    return memoryview(map_partition(lease.partition_fds[0], lease.partition_sizes[0]))


async def test_a_holder_sees_what_came_before_a_stall_and_then_the_rest(
    web: WebServer, content: bytes, tmp_path: Path
):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, web.url)
        web.faults.stall, web.faults.stall_file = threading.Event(), PARTITION
        web.faults.from_byte = CHUNK
        async with leased_early(store) as (lease, news):
            await wait_for_front(news, CHUNK)
            assert mapped(lease)[:CHUNK] == content[:CHUNK]
            assert store.service.pool.get(NAME) is None
            assert not (tmp_path / "store/models" / NAME).exists()
            with pytest.raises(GearfallError, match="not in the DRAM pool"):
                await take_lease(
                    str(store.service.attach.path),
                    NAME,
                    store.service.catalogue.models[NAME].digest,
                    "late",
                )
            web.faults.stall.set()
            await asyncio.to_thread(news.wait_done)
            assert mapped(lease)[:] == content
            assert store.service.pool.holders(NAME) == ("early",)
            store.service.pool.check()
        assert (tmp_path / "store/models" / NAME / PARTITION).read_bytes() == content


async def test_a_cut_half_way_is_taken_up_again_under_the_same_lease(
    web: WebServer, content: bytes, tmp_path: Path
):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, web.url)
        web.faults.from_byte, web.faults.cut_after_bytes, web.faults.cuts_left = CHUNK, 1 << 20, 2
        async with leased_early(store) as (lease, news):
            await asyncio.to_thread(news.wait_done)
            assert mapped(lease)[:] == content
        assert web.faults.cuts_left == 0


async def test_a_lie_half_way_is_heard_by_who_computes_behind_it(
    web: WebServer, content: bytes, tmp_path: Path
):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, web.url)
        web.faults.replace[PARTITION] = content[:-1000] + bytes(1000)
        web.faults.stall, web.faults.stall_file = threading.Event(), PARTITION
        web.faults.from_byte = CHUNK
        async with leased_early(store) as (lease, news):
            await wait_for_front(news, CHUNK)
            web.faults.stall.set()
            with pytest.raises(CorruptCheckpoint, match="came with other bytes"):
                await asyncio.to_thread(news.wait_done)
            assert mapped(lease)[:CHUNK] == content[:CHUNK]
        await wait_idle(store)
        assert store.service.pool.used_bytes == 0
        assert list((tmp_path / "store/models").iterdir()) == []


async def wait_idle(store: RunningStore) -> None:
    with contextlib.suppress(GearfallError):
        await store.service.load(NAME).wait()


async def test_the_next_place_goes_on_where_a_neighbour_gave_its_copy_up(
    web: WebServer, content: bytes, tmp_path: Path
):
    server = MemoryStateServer()
    async with (
        running_store(tmp_path / "one", node="node-1", server=server) as one,
        running_store(tmp_path / "two", node="node-2", server=server) as two,
    ):
        for store in (one, two):
            await store.register(NAME, web.url)
        await one.load(NAME)
        await two.wait_until(lambda: NAME in (two.cluster.view.nodes[one.node_id].on_ssd or ()))
        flight = two.service.load(NAME)
        (load,) = two.service.loader._loads.values()
        load.may_go_on = turnstile = Turnstile(CONNECTIONS)
        asked = len(web.faults.requests)
        async with leased_early(two) as (lease, news):
            await wait_for_front(news, CONNECTIONS * CHUNK)
            one.service.ssd.models.pop(NAME)
            one.service.transfers.close()  # cuts what is under way, and has no more to give
            one.service.transfers.start()
            turnstile.is_open.set()
            await asyncio.to_thread(news.wait_done)
            assert mapped(lease)[:] == content
        assert (await flight.wait()).timeline.remote_s > 0
        parts = [range_ for file, range_ in web.faults.requests[asked:] if file == PARTITION]
        assert parts == [f"bytes={CONNECTIONS * CHUNK}-{len(content) - 1}"]
        stored = tmp_path / "two/models" / NAME / PARTITION
        assert stored.read_bytes() == content
        two.service.pool.check()


async def test_the_canary_comes_from_a_neighbour_before_the_bytes(tmp_path: Path):
    server, asked = MemoryStateServer(), []

    async def compute(request: CanaryRequest, size_bytes: int) -> Canary:
        asked.append(request.directory)
        return CANARY

    async with (
        running_store(
            tmp_path / "one", node="node-1", server=server, compute_canary=compute
        ) as one,
        running_store(
            tmp_path / "two", node="node-2", server=server, compute_canary=compute
        ) as two,
    ):
        await one.register(NAME, write_source(tmp_path / "src"))
        await two.wait_model(NAME, ("node-1",))
        reply = await two.call("ReadCanary", pb.ReadCanaryRequest(model=NAME))
        assert reply.content == canary_bytes(CANARY)
        assert NAME not in two.service.ssd.models
        await two.load(NAME)
        assert (await two.call("ReadCanary", pb.ReadCanaryRequest(model=NAME))) == reply
        assert len(asked) == 1
