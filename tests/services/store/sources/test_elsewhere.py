"""Stores that bring models from URLs and from each other, through their doors."""

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from gearfall.core.checkpoint.manifest import (
    AdapterFacts,
    manifest_bytes,
    manifest_digest,
    parse_manifest,
)
from gearfall.core.errors import (
    Conflict,
    CorruptCheckpoint,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from gearfall.core.generation.canary import Canary, CanaryToken
from gearfall.core.ids import ModelName
from gearfall.infra.memory.pool_lease import map_partition
from gearfall.infra.state.memory_state import MemoryStateServer
from gearfall.pb import common_pb2
from gearfall.pb import store_pb2 as pb
from services.store.models.canary_process import CanaryRequest
from tests.gearfall.infra.web_servers import WebServer, web_server
from tests.services.store.checkpoints import many_tensors, write_checkpoint
from tests.services.store.source_directories import llama_tensors, write_source
from tests.services.store.stores import TIMEOUT_S, RunningStore, running_store

NAME = ModelName("m")
MIB = 2**20
PARTITION = "partition-0.bin"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", many_tensors(9))
    return tmp_path / "model"


@pytest.fixture
def web(model: Path) -> Iterator[WebServer]:
    with web_server(model) as server:
        yield server


async def leased_bytes(store: RunningStore, name: str = NAME) -> bytes:
    with await store.lease(name) as lease:
        return map_partition(lease.partition_fds[0], lease.partition_sizes[0])[:]


async def a_canary(request: CanaryRequest, size_bytes: int) -> Canary:
    return Canary((1, 2), (CanaryToken(3, -0.5, 1.0, 0.001),))


def on_ssd(directory: Path) -> list[str]:
    """What is there, but for evicted models' files: they go behind the load that needs the room."""
    names = (entry.name for entry in (directory / "models").iterdir())
    return sorted(name for name in names if not name.startswith(".trash-"))


def nothing_half_way(directory: Path) -> bool:
    return not any(name.startswith(".") for name in on_ssd(directory))


async def prefetch(store: RunningStore, name: str = NAME) -> list[pb.LoadProgress]:
    request = pb.LoadModelRequest(model=name, priority=-1, target=common_pb2.TIER_SSD)
    return [message async for message in store.stub.LoadModel(request, timeout=TIMEOUT_S)]


async def test_a_url_is_registered_without_its_bytes_and_loaded_in_one_pass(
    web: WebServer, model: Path, tmp_path: Path
):
    async with running_store(tmp_path / "store") as store:
        registered = (await store.register(NAME, web.url))[-1].model
        assert registered.source == web.url
        assert not any(file == PARTITION for file, _ in web.faults.requests)
        file = await store.call("ReadFile", pb.ReadFileRequest(model=NAME, file="config.json"))
        assert file.content == (model / "config.json").read_bytes()
        await store.wait_model(NAME, ("node-0",))
        await store.wait_node(on_ssd=())

        progress = await store.load(NAME)
        assert progress[0].tier == common_pb2.TIER_REMOTE
        assert progress[-1].timeline.from_tier == common_pb2.TIER_REMOTE
        assert progress[-1].timeline.remote_s > 0
        assert progress[-1].digest == manifest_digest((model / "manifest.json").read_bytes())
        asked = [range_ for file, range_ in web.faults.requests if file == PARTITION]
        assert len(asked) == len(set(asked)) == 3
        content = (model / PARTITION).read_bytes()
        assert await leased_bytes(store) == content
        assert (tmp_path / "store/models/m" / PARTITION).read_bytes() == content

        await store.call("UnloadModel", pb.UnloadModelRequest(model=NAME))
        again = (await store.load(NAME))[-1]
        assert again.timeline.from_tier == common_pb2.TIER_SSD
        status = await store.call("GetStatus", pb.StoreStatusRequest())
        speeds = {tier.tier: tier.bytes_per_s for tier in status.tiers}
        assert speeds[common_pb2.TIER_REMOTE] > 0
        assert speeds[common_pb2.TIER_SSD] > 0
        node = await store.wait_node(on_ssd=(NAME,), resident=(NAME,))
        assert node.remote_bytes_per_s > 0
        assert node.ssd_used_bytes == registered.size_bytes


async def test_a_restart_knows_remote_models_and_removes_half_written_ones(
    web: WebServer, tmp_path: Path
):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, web.url)
    for leftover in ("models/.incoming-m-x", "remote/.incoming-m-x"):
        (tmp_path / "store" / leftover).mkdir()
    async with running_store(tmp_path / "store") as store:
        assert nothing_half_way(tmp_path / "store")
        assert [entry.name for entry in (tmp_path / "store/remote").iterdir()] == [NAME]
        await store.wait_model(NAME, ("node-0",))
        await store.load(NAME)


async def test_other_bytes_below_the_url_than_were_registered(web: WebServer, tmp_path: Path):
    other = tmp_path / "other"
    write_checkpoint(other, llama_tensors(seed=1))
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, web.url)
        assert (await store.register(NAME, web.url))[-1].phase == "done"
        with pytest.raises(Conflict):
            await store.register(NAME, other.as_uri())
        with pytest.raises(Conflict, match="registered from"):
            await store.register(NAME, write_source(tmp_path / "src"))
        for entry in other.iterdir():
            web.faults.replace[entry.name] = entry.read_bytes()
        with pytest.raises(CorruptCheckpoint, match="another checkpoint"):
            await store.load(NAME)
        web.faults.replace.clear()
        await store.load(NAME)


async def test_a_deleted_remote_model_is_gone(web: WebServer, tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, web.url)
        await store.load(NAME)
        await store.call("DeleteModel", pb.DeleteModelRequest(model=NAME))
        with pytest.raises(NotFound):
            await store.load(NAME)
        assert on_ssd(tmp_path / "store") == []
        assert list((tmp_path / "store/remote").iterdir()) == []


async def test_a_neighbour_gives_what_it_has(tmp_path: Path):
    server = MemoryStateServer()
    source = write_source(tmp_path / "src", many_tensors(9))
    async with (
        running_store(tmp_path / "one", node="node-1", server=server) as one,
        running_store(tmp_path / "two", node="node-2", server=server) as two,
    ):
        await one.register(NAME, source)
        await two.wait_model(NAME, ("node-1",))
        progress = await two.load(NAME)
        assert progress[-1].timeline.from_tier == common_pb2.TIER_REMOTE
        assert await leased_bytes(two) == (tmp_path / "one/models/m" / PARTITION).read_bytes()
        await two.wait_model(NAME, ("node-1", "node-2"))
        # From memory as well as from disk.
        await one.load(NAME)
        await two.call("DeleteModel", pb.DeleteModelRequest(model=NAME))
        await two.wait_model(NAME, ("node-1",))
        assert await leased_bytes(two) == (tmp_path / "one/models/m" / PARTITION).read_bytes()
        one.service.pool.check()


async def test_a_neighbour_that_lies_is_found_out(tmp_path: Path):
    server = MemoryStateServer()
    source = write_source(tmp_path / "src", many_tensors(2))
    async with (
        running_store(tmp_path / "one", node="node-1", server=server) as one,
        running_store(tmp_path / "two", node="node-2", server=server) as two,
    ):
        await one.register(NAME, source)
        await two.wait_model(NAME, ("node-1",))
        path = tmp_path / "one/models/m" / PARTITION
        with path.open("r+b") as file:
            file.seek(MIB)
            file.write(os.urandom(16))
        with pytest.raises(CorruptCheckpoint, match="chunk 0 "):
            await two.load(NAME)
        assert on_ssd(tmp_path / "two") == []
        two.service.pool.check()
        assert two.service.pool.used_bytes == 0


async def test_a_transfer_is_for_those_who_know_what_they_want(tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, write_source(tmp_path / "src"))
        digest = store.service.ssd.get(NAME).digest
        for wrong, error in (
            (pb.OpenTransferRequest(model="x", digest=digest, connections=1), NotFound),
            (pb.OpenTransferRequest(model=NAME, digest="0" * 32, connections=1), Conflict),
            (pb.OpenTransferRequest(model=NAME, digest=digest), InvalidRequest),
            (pb.OpenTransferRequest(model=NAME, digest=digest, connections=17), InvalidRequest),
        ):
            with pytest.raises(error):
                await store.call("OpenTransfer", wrong)


async def test_small_files_of_a_neighbours_model_come_with_it(tmp_path: Path):
    """A worker asks for them before the store that it is told to start from has anything."""
    server = MemoryStateServer()
    async with (
        running_store(tmp_path / "one", node="node-1", server=server) as one,
        running_store(tmp_path / "two", node="node-2", server=server) as two,
    ):
        await one.register(NAME, write_source(tmp_path / "src"))
        await one.wait_node(on_ssd=(NAME,))
        await two.wait_model(NAME, ("node-1",))
        request = pb.ReadFileRequest(model=NAME, file="config.json")
        file, loaded = await asyncio.gather(two.call("ReadFile", request), two.load(NAME))
        assert file.content == (tmp_path / "src" / "config.json").read_bytes()
        assert loaded[-1].timeline.from_tier == common_pb2.TIER_REMOTE
        assert loaded[-1].timeline.ssd_s == 0.0
        await two.wait_node(on_ssd=(NAME,), resident=(NAME,))
        with pytest.raises(NotFound):
            await two.call("ReadFile", pb.ReadFileRequest(model="nobody-has-it", file="a"))


async def test_an_adapter_below_a_url_is_no_model(model: Path, tmp_path: Path):
    manifest = parse_manifest((model / "manifest.json").read_bytes())
    facts = AdapterFacts("0" * 32, rank=2, alpha=4.0, is_rank_stabilised=False)
    (model / "manifest.json").write_bytes(manifest_bytes(replace(manifest, adapter=facts)))
    async with running_store(tmp_path / "store") as store:
        with pytest.raises(InvalidRequest, match="LoRA adapter"):
            await store.register(NAME, model.as_uri())
        assert on_ssd(tmp_path / "store") == []
        assert store.cluster.view.models == {}


async def test_the_dead_neighbour_is_passed_over_for_the_url(web: WebServer, tmp_path: Path):
    server = MemoryStateServer()
    async with running_store(tmp_path / "two", node="node-2", server=server) as two:
        async with running_store(tmp_path / "one", node="node-1", server=server) as one:
            await one.register(NAME, web.url)
            await two.wait_model(NAME, ("node-1",))
        await two.wait_until(lambda: "node-1" not in two.cluster.view.nodes)
        assert (await two.load(NAME))[-1].done


async def test_what_came_from_a_url_leaves_the_disk_and_comes_back(tmp_path: Path):
    size = write_checkpoint(tmp_path / "a", many_tensors(2)).size_bytes
    write_checkpoint(tmp_path / "b", many_tensors(2, seed=9))
    room = 2 * size - 1
    async with running_store(tmp_path / "store", ssd_bytes=room, dram_bytes=8 * size) as store:
        for name in ("a", "b"):
            await store.register(name, (tmp_path / name).as_uri())
        await store.load("a")
        await store.load("b")
        assert on_ssd(tmp_path / "store") == ["b"]
        assert store.service.room.used_bytes == size
        await store.wait_model("a", ("node-0",))
        await store.call("UnloadModel", pb.UnloadModelRequest(model="a"))
        assert (await store.load("a"))[-1].timeline.from_tier == common_pb2.TIER_REMOTE
        assert on_ssd(tmp_path / "store") == ["a"]


async def test_a_resident_model_that_left_the_disk_still_starts(tmp_path: Path):
    """Its canary and its small files are asked for at each start."""
    size = write_checkpoint(tmp_path / "a", many_tensors(2)).size_bytes
    write_checkpoint(tmp_path / "b", many_tensors(2, seed=9))
    room = 2 * size - 1
    async with running_store(
        tmp_path / "store", ssd_bytes=room, dram_bytes=8 * size, compute_canary=a_canary
    ) as store:
        for name in ("a", "b"):
            await store.register(name, (tmp_path / name).as_uri())
        request = pb.ReadCanaryRequest(model="a")
        canary = await store.call("ReadCanary", request)
        await store.load("b")
        assert on_ssd(tmp_path / "store") == ["b"]
        assert (await store.load("a"))[-1].timeline.from_tier == common_pb2.TIER_DRAM
        assert await store.call("ReadCanary", request) == canary
        assert on_ssd(tmp_path / "store") == ["b"]


async def test_one_without_a_recorded_canary_comes_back_to_the_disk_for_it(tmp_path: Path):
    size = write_checkpoint(tmp_path / "a", many_tensors(2)).size_bytes
    write_checkpoint(tmp_path / "b", many_tensors(2, seed=9))
    room = 2 * size - 1
    async with running_store(
        tmp_path / "store", ssd_bytes=room, dram_bytes=8 * size, compute_canary=a_canary
    ) as store:
        for name in ("a", "b"):
            await store.register(name, (tmp_path / name).as_uri())
            await store.load(name)
        assert on_ssd(tmp_path / "store") == ["b"]
        assert (await store.call("ReadCanary", pb.ReadCanaryRequest(model="a"))).content
        assert on_ssd(tmp_path / "store") == ["a"]


async def test_the_only_copy_never_leaves(tmp_path: Path):
    write_checkpoint(tmp_path / "b", many_tensors(2))
    async with running_store(tmp_path / "store", ssd_bytes=3 * MIB) as store:
        await store.register("a", write_source(tmp_path / "src", many_tensors(2, seed=5)))
        await store.register("b", (tmp_path / "b").as_uri())
        with pytest.raises(Overloaded, match="only copy"):
            await store.load("b")
        with pytest.raises(Overloaded, match="only copy"):
            await store.register("c", write_source(tmp_path / "c", many_tensors(2, seed=7)))
        with pytest.raises(InvalidRequest, match="--ssd-bytes"):
            await store.register("d", write_source(tmp_path / "d", many_tensors(4)))
        assert on_ssd(tmp_path / "store") == ["a"]
        assert (await store.load("a"))[-1].done


async def test_two_nodes_do_not_both_give_up_their_copy(tmp_path: Path):
    server = MemoryStateServer()
    source, room = write_source(tmp_path / "src", many_tensors(2)), 3 * MIB
    async with (
        running_store(tmp_path / "one", node="node-1", server=server, ssd_bytes=room) as one,
        running_store(tmp_path / "two", node="node-2", server=server, ssd_bytes=room) as two,
    ):
        await asyncio.gather(one.register(NAME, source), two.register(NAME, source))
        for store in (one, two):
            await store.wait_model(NAME, ("node-1", "node-2"))
        others = [write_source(tmp_path / n, many_tensors(2, seed=40)) for n in ("x", "y")]
        results = await asyncio.gather(
            one.register("x", others[0]), two.register("y", others[1]), return_exceptions=True
        )
        kept = [path for path in ("one", "two") if NAME in on_ssd(tmp_path / path)]
        assert len(kept) == 1
        assert [type(result) for result in results].count(Overloaded) == 1
        await one.wait_model(NAME, ("node-1" if kept == ["one"] else "node-2",))


async def stalled_prefetch(store: RunningStore, web: WebServer) -> asyncio.Task[Any]:
    """Return a prefetch whose server hangs in the middle of a partition."""
    web.faults.stall, web.faults.stall_file = threading.Event(), PARTITION
    task = asyncio.create_task(prefetch(store))
    assert await asyncio.to_thread(web.faults.partition_asked.wait, TIMEOUT_S)
    return task


async def test_a_prefetch_ends_on_ssd_and_gives_way_to_demand(web: WebServer, tmp_path: Path):
    write_checkpoint(tmp_path / "b", many_tensors(2))
    async with running_store(tmp_path / "store") as store:
        await store.register("b", (tmp_path / "b").as_uri())
        await store.register(NAME, web.url)
        prefetching = await stalled_prefetch(store, web)
        assert (await store.load("b"))[-1].done
        assert not prefetching.done()
        assert web.faults.stall is not None
        web.faults.stall.set()
        done = (await prefetching)[-1]
        assert done.tier == common_pb2.TIER_SSD
        assert store.service.pool.peek(NAME) is None
        assert NAME in on_ssd(tmp_path / "store")


async def test_a_prefetch_is_cancelled_and_a_demand_is_not(web: WebServer, tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, web.url)
        prefetching = await stalled_prefetch(store, web)
        assert store.service.cancel_prefetch(NAME)
        with pytest.raises(grpc.aio.AioRpcError, match="cancelled"):
            await prefetching
        assert not store.service.cancel_prefetch(NAME)
        demand = store.service.load(NAME)
        assert not store.service.cancel_prefetch(NAME)
        assert web.faults.stall is not None
        web.faults.stall.set()
        await demand.wait()
        assert on_ssd(tmp_path / "store") == [NAME]


async def test_nobody_has_it_any_more(web: WebServer, tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, web.url)
        (tmp_path / "model/manifest.json").unlink()
        with pytest.raises(Unavailable, match="is not there"):
            await store.load(NAME)
        with pytest.raises(InvalidRequest):
            await store.register("x", "ftp://host/model")
        assert nothing_half_way(tmp_path / "store")
