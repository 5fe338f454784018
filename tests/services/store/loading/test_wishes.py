"""A store that follows the leader's wishes: real files, cluster state in memory."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gearfall.core.ids import ModelName, NodeId
from gearfall.core.ports import Fence
from gearfall.core.records import PrefetchRecord
from gearfall.core.tiers import Tier
from gearfall.infra.state.memory_state import MemoryStateServer
from gearfall.pb import store_pb2 as pb
from services.store.loading.wishes import Wishes, WishOutcome
from tests.gearfall.infra.metric_samples import samples_of
from tests.gearfall.infra.web_servers import WebServer, web_server
from tests.services.store.checkpoints import many_tensors, write_checkpoint
from tests.services.store.held_reads import HeldReads
from tests.services.store.source_directories import llama_tensors, write_source
from tests.services.store.stores import TIMEOUT_S, RunningStore, running_store

NAME, OTHER = ModelName("tiny"), ModelName("other")
NODE, SEEN = NodeId("node-0"), NodeId("seen")
"""The store itself follows the wishes of the first, the test's own follower those of the second."""


class Follower:
    """A follower of wishes over a real store, with what it reports in order."""

    def __init__(self, store: RunningStore) -> None:
        self._ends: asyncio.Queue[WishOutcome] = asyncio.Queue()
        self.wishes = Wishes(
            store.cluster, SEEN, store.service, on_ended=self._ends.put_nowait, retry_s=0.02
        )

    async def next_end(self) -> WishOutcome:
        async with asyncio.timeout(TIMEOUT_S):
            return await self._ends.get()

    def has_said_all(self) -> bool:
        return self._ends.empty()


@contextlib.asynccontextmanager
async def following(store: RunningStore) -> AsyncIterator[Follower]:
    follower = Follower(store)
    task = asyncio.create_task(follower.wishes.run())
    yield follower
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def fence_of(store: RunningStore) -> Fence:
    """Return that of whoever began to lead first."""
    entry = await store.state.get("leader")
    return Fence("leader", entry.create_revision if entry else await store.state.put("leader", b""))


async def wish(
    store: RunningStore, model: ModelName = NAME, *, tier: Tier = Tier.DRAM, node: NodeId = SEEN
) -> None:
    record = PrefetchRecord(node, model, tier, "test", float(store.cluster.view.revision))
    await store.cluster.put_prefetch(record, fence=await fence_of(store))


async def unwish(store: RunningStore, model: ModelName = NAME, *, node: NodeId = SEEN) -> None:
    await store.cluster.delete_prefetch(node, model, fence=await fence_of(store))


async def test_what_is_wished_comes_and_stays_when_the_wish_goes(tmp_path: Path):
    async with running_store(tmp_path / "store") as store, following(store) as follower:
        await store.register(NAME, write_source(tmp_path / "src"))
        await wish(store)
        await store.wait_node(resident=(NAME,))
        assert await follower.next_end() is WishOutcome.BROUGHT
        assert not follower.wishes.pending
        await unwish(store)
        await wish(store, OTHER, tier=Tier.SSD)
        assert await follower.next_end() is WishOutcome.FAILED
        assert store.service.pool.peek(NAME) is not None


async def test_a_wish_that_goes_stops_the_read(tmp_path: Path):
    reads = HeldReads()
    async with running_store(tmp_path / "s", read=reads) as store, following(store) as follower:
        await store.register(NAME, write_source(tmp_path / "src"))
        await wish(store)
        assert await asyncio.to_thread(reads.is_held.wait, TIMEOUT_S)
        assert follower.wishes.pending == {NAME: Tier.DRAM}
        await unwish(store)
        assert await follower.next_end() is WishOutcome.GIVEN_UP
        assert not follower.wishes.pending
        assert not store.service.loader.is_loading(NAME)
        # Asked for while the reader has not let go of the memory yet.
        call = store.stub.LoadModel(pb.LoadModelRequest(model=NAME), timeout=TIMEOUT_S)
        progress = aiter(call)
        assert not (await anext(progress)).done
        reads.may_go_on.set()
        *_, last = [message async for message in progress]
        assert last.done
        assert follower.has_said_all()


async def test_a_wish_that_goes_does_not_stop_who_asked_for_the_model(tmp_path: Path):
    reads = HeldReads()
    async with running_store(tmp_path / "s", read=reads) as store, following(store) as follower:
        await store.register(NAME, write_source(tmp_path / "src"))
        await wish(store)
        assert await asyncio.to_thread(reads.is_held.wait, TIMEOUT_S)
        call = store.stub.LoadModel(pb.LoadModelRequest(model=NAME), timeout=TIMEOUT_S)
        progress = aiter(call)
        assert not (await anext(progress)).done
        await unwish(store)
        assert await follower.next_end() is WishOutcome.GIVEN_UP
        assert store.service.loader.is_loading(NAME)
        reads.may_go_on.set()
        *_, last = [message async for message in progress]
        assert last.done


async def test_a_restarted_store_follows_its_wishes_while_state_is_down(tmp_path: Path):
    server = MemoryStateServer()
    async with running_store(tmp_path / "store", server=server) as store:
        await store.register(NAME, write_source(tmp_path / "src"))
        await wish(store, node=NODE)
        await store.wait_node(resident=(NAME,))
    reads = HeldReads()
    async with running_store(tmp_path / "store", server=server, read=reads) as store:
        assert await asyncio.to_thread(reads.is_held.wait, TIMEOUT_S)
        samples = samples_of(store.service.render_metrics())
        assert samples["gearfall_store_pending_wishes",] == 1
        server.stop()
        reads.may_go_on.set()
        await store.service.load(NAME, -1).wait()
        server.start()
        await store.wait_node(resident=(NAME,))
        samples = samples_of(store.service.render_metrics())
        assert samples["gearfall_store_pending_wishes",] == 0
        assert samples["gearfall_store_wishes_total", "brought"] == 1


async def test_a_state_that_was_wiped_wishes_for_nothing(tmp_path: Path):
    server, reads = MemoryStateServer(), HeldReads()
    async with (
        running_store(tmp_path / "s", server=server, read=reads) as store,
        following(store) as follower,
    ):
        await store.register(NAME, write_source(tmp_path / "src"))
        await wish(store)
        assert await asyncio.to_thread(reads.is_held.wait, TIMEOUT_S)
        server.wipe()
        assert await follower.next_end() is WishOutcome.GIVEN_UP
        reads.may_go_on.set()


async def test_what_is_leased_never_makes_room(tmp_path: Path):
    async with running_store(tmp_path / "probe") as store:
        await store.register(NAME, write_source(tmp_path / "src"))
        await store.load(NAME)
        size_bytes = store.service.pool.used_bytes
    async with (
        running_store(tmp_path / "store", dram_bytes=size_bytes + 1) as store,
        following(store) as follower,
    ):
        await store.register(NAME, tmp_path / "src")
        await store.register(OTHER, write_source(tmp_path / "other", llama_tensors(1)))
        lease = await store.lease(NAME)
        await wish(store, OTHER)
        for _ in range(2):
            assert await follower.next_end() is WishOutcome.FAILED
        assert store.service.pool.peek(NAME) is not None
        assert follower.wishes.pending == {OTHER: Tier.DRAM}
        lease.close()
        await store.wait_node(resident=(OTHER,))


async def test_what_left_the_pool_again_waits_for_a_new_wish(tmp_path: Path):
    async with running_store(tmp_path / "store") as store, following(store) as follower:
        await store.register(NAME, write_source(tmp_path / "src"))
        await wish(store)
        assert await follower.next_end() is WishOutcome.BROUGHT
        await store.call("UnloadModel", pb.UnloadModelRequest(model=NAME))
        await wish(store, OTHER)
        assert await follower.next_end() is WishOutcome.FAILED
        assert store.service.pool.peek(NAME) is None
        await unwish(store)
        await wish(store)
        await store.wait_node(resident=(NAME,))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    write_checkpoint(tmp_path / "model", many_tensors(9))
    with web_server(tmp_path / "model") as server:
        yield server


async def test_far_bytes_come_to_the_disk_alone(tmp_path: Path, web: WebServer):
    async with running_store(tmp_path / "store") as store, following(store) as follower:
        await store.register(NAME, web.url)
        await wish(store, tier=Tier.SSD)
        assert await follower.next_end() is WishOutcome.BROUGHT
        await store.wait_node(on_ssd=(NAME,), resident=())
