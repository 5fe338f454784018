"""The store through its doors: gRPC, attach socket, cluster state."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from gearfall.core.errors import Conflict, InvalidRequest, NotFound, Unavailable
from gearfall.core.ids import ModelName, NodeId
from gearfall.infra.memory.native import read_chunks
from gearfall.infra.memory.pool_lease import map_partition
from gearfall.infra.state.memory_state import MemoryStateServer
from gearfall.pb import common_pb2
from gearfall.pb import store_pb2 as pb
from tests.services.store.source_directories import CONFIG, llama_tensors, write_source
from tests.services.store.stores import TIMEOUT_S, running_store

NAME = ModelName("tiny")


async def test_from_a_directory_to_a_mapped_model(tmp_path: Path):
    source = write_source(tmp_path / "src")
    async with running_store(tmp_path / "store") as store:
        progress = await store.register(NAME, source)
        assert [message.phase for message in progress][-1] == "done"
        assert progress[-1].model.name == NAME
        assert progress[-1].done_bytes == progress[-1].total_bytes > 0
        assert all(not message.HasField("model") for message in progress[:-1])

        record = await store.wait_model(NAME, ("node-0",))
        assert record.architecture == "LlamaForCausalLM"
        assert record.context_tokens == CONFIG["max_position_embeddings"]
        assert record.kv_bytes_per_token == 2 * 2 * 1 * 4 * 4
        assert set(record.files) == {"config.json", "tokenizer.json", "source-headers.bin"}

        done = (await store.load(NAME))[-1]
        assert done.done
        assert done.digest == record.digest
        assert done.timeline.from_tier == common_pb2.TIER_SSD
        again = (await store.load(NAME))[-1]
        assert again.timeline.from_tier == common_pb2.TIER_DRAM

        with await store.lease(NAME) as lease:
            named = lease.manifest.tensors_by_name()
            mapping = map_partition(lease.partition_fds[0], lease.partition_sizes[0])
            for name, (_, _, content) in llama_tensors().items():
                entry = named[name]
                assert mapping[entry.offset_bytes :][: entry.size_bytes] == content

        node = await store.wait_node(resident=(NAME,))
        assert node.address == store.service.address
        assert node.dram_used_bytes == record.size_bytes


async def test_a_small_file_is_read_by_its_name(tmp_path: Path):
    source = write_source(tmp_path / "src")
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, source)
        reply = await store.call("ReadFile", pb.ReadFileRequest(model=NAME, file="config.json"))
        assert reply.content == (source / "config.json").read_bytes()
        for file in ("../lock", "manifest.json", "partition-0.bin", "/etc/passwd", "a\0b", ""):
            with pytest.raises(NotFound):
                await store.call("ReadFile", pb.ReadFileRequest(model=NAME, file=file))
        with pytest.raises(InvalidRequest):
            await store.call("ReadFile", pb.ReadFileRequest(model="../tiny", file="config.json"))


@pytest.mark.parametrize("wanted_unix_s", [-1.0, float("nan"), float("inf")])
async def test_a_load_that_is_wanted_since_no_moment_is_refused(tmp_path: Path, wanted_unix_s):
    async with running_store(tmp_path / "store") as store:
        with pytest.raises(InvalidRequest, match="moment"):
            store.service.load(NAME, wanted_unix_s=wanted_unix_s)


async def test_what_is_leased_is_neither_unloaded_nor_deleted(tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, write_source(tmp_path / "src"))
        with await store.lease(NAME):
            with pytest.raises(Conflict, match="worker"):
                await store.call("UnloadModel", pb.UnloadModelRequest(model=NAME))
            with pytest.raises(Conflict, match="worker"):
                await store.call("DeleteModel", pb.DeleteModelRequest(model=NAME))
            status = await store.call("GetStatus", pb.StoreStatusRequest())
            leases = {entry.tier: entry.leases for entry in status.residency}
            assert leases == {common_pb2.TIER_SSD: 0, common_pb2.TIER_DRAM: 1}


async def test_a_deleted_model_is_gone_everywhere(tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, write_source(tmp_path / "src"))
        await store.load(NAME)
        await store.call("DeleteModel", pb.DeleteModelRequest(model=NAME))
        assert await store.state.get(f"models/{NAME}") is None
        assert not (tmp_path / "store/models" / NAME).exists()
        await store.wait_node(resident=(), dram_used_bytes=0)
        with pytest.raises(NotFound):
            await store.load(NAME)
        with pytest.raises(NotFound):
            await store.call("DeleteModel", pb.DeleteModelRequest(model=NAME))
        await store.register(NAME, write_source(tmp_path / "src", llama_tensors(seed=1)))


async def test_unloading_frees_the_pool_and_keeps_the_disk(tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        model = (await store.register(NAME, write_source(tmp_path / "src")))[-1].model
        await store.load(NAME)
        reply = await store.call("UnloadModel", pb.UnloadModelRequest(model=NAME))
        assert reply.freed_bytes == model.size_bytes
        with pytest.raises(NotFound):
            await store.call("UnloadModel", pb.UnloadModelRequest(model=NAME))
        await store.load(NAME)


async def test_five_hundred_callers_cause_one_load(tmp_path: Path):
    reads: list[str] = []
    gate = threading.Event()

    def read(path: str | os.PathLike[str], **range_: Any) -> list[int]:
        reads.append(str(path))
        assert gate.wait(TIMEOUT_S)
        return read_chunks(path, **range_)

    async with running_store(tmp_path / "store", read=read) as store:
        await store.register(NAME, write_source(tmp_path / "src"))
        loads = [asyncio.create_task(store.load(NAME)) for _ in range(500)]
        gate.set()
        digests = {(await load)[-1].digest for load in loads}
        assert len(digests) == 1
        assert len(reads) == 1


async def test_a_restart_finds_the_models_and_publishes_them_again(tmp_path: Path):
    source = write_source(tmp_path / "src")
    async with running_store(tmp_path / "store") as store:
        first = (await store.register(NAME, source))[-1].model
    async with running_store(tmp_path / "store") as store:
        record = await store.wait_model(NAME, ("node-0",))
        assert (record.digest, record.source) == (first.digest, str(source))
        assert (await store.load(NAME))[-1].digest == first.digest


async def test_registering_again_is_the_same_and_other_bytes_conflict(tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        first = await store.register(NAME, write_source(tmp_path / "one"))
        again = await store.register(NAME, write_source(tmp_path / "two"))
        assert again[-1].model == first[-1].model
        with pytest.raises(Conflict):
            await store.register(NAME, write_source(tmp_path / "three", llama_tensors(seed=1)))
        assert (await store.load(NAME))[-1].digest == first[-1].model.digest


async def test_two_nodes_share_a_record(tmp_path: Path):
    server = MemoryStateServer()
    source = write_source(tmp_path / "src")
    other_bytes = write_source(tmp_path / "other", llama_tensors(seed=1))
    async with (
        running_store(tmp_path / "one", node="node-1", server=server) as one,
        running_store(tmp_path / "two", node="node-2", server=server) as two,
    ):
        await asyncio.gather(one.register(NAME, source), two.register(NAME, source))
        await one.wait_model(NAME, ("node-1", "node-2"))
        await one.register("mine", source)
        with pytest.raises(Conflict, match="node-1"):
            await two.register("mine", other_bytes)
        assert "mine" not in two.service.ssd.models
        await one.call("DeleteModel", pb.DeleteModelRequest(model=NAME))
        await one.wait_model(NAME, ("node-2",))
        await two.load(NAME)


async def test_a_lost_lease_and_a_lost_state_heal(tmp_path: Path):
    server = MemoryStateServer()
    async with running_store(tmp_path / "store", server=server) as store:
        await store.register(NAME, write_source(tmp_path / "src"))
        for lose in (lambda: server.end_lease(min(server.leases)), server.wipe):
            lost = set(server.leases)
            lose()

            def is_back(lost: set[int] = lost) -> bool:
                node = server.entries.get("nodes/node-0")
                return f"models/{NAME}" in server.entries and bool(
                    node and node.lease_id in server.leases - lost
                )

            await store.wait_until(is_back)


async def test_state_down_during_a_registration_is_said_and_heals(tmp_path: Path):
    server = MemoryStateServer()
    source = write_source(tmp_path / "src")
    async with running_store(tmp_path / "store", server=server) as store:
        server.stop()
        with pytest.raises(Unavailable):
            await store.register(NAME, source)
        server.start()
        await store.wait_model(NAME, ("node-0",))
        await store.register(NAME, source)


async def test_a_node_that_lost_a_model_is_no_longer_listed(tmp_path: Path):
    server = MemoryStateServer()
    async with running_store(tmp_path / "store", server=server) as store:
        await store.register(NAME, write_source(tmp_path / "src"))
        await store.wait_model(NAME, ("node-0",))
    async with running_store(tmp_path / "fresh", server=server) as store:
        assert await store.wait_model(NAME, ())


async def test_the_node_leaves_cluster_state_when_it_stops(tmp_path: Path):
    server = MemoryStateServer()
    async with running_store(tmp_path / "store", server=server) as store:
        await store.wait_node()
        assert NodeId("node-0") == store.node_id
        assert "nodes/node-0" in server.entries
    assert "nodes/node-0" not in server.entries


async def test_a_model_removed_while_a_store_was_down_does_not_come_back(tmp_path: Path):
    server = MemoryStateServer()
    source = write_source(tmp_path / "src")
    async with running_store(tmp_path / "store", server=server) as store:
        for name in (NAME, "kept"):
            await store.register(name, source)
    del server.entries[f"models/{NAME}"]
    async with running_store(tmp_path / "store", server=server) as store:
        assert list(store.cluster.view.models) == ["kept"]
        assert [entry.name for entry in (tmp_path / "store/models").iterdir()] == ["kept"]
        with pytest.raises(NotFound):
            await store.load(NAME)
        await store.register(NAME, source)
        await store.load(NAME)


async def test_state_made_anew_while_a_store_was_down_learns_its_models(tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, write_source(tmp_path / "src"))
    async with running_store(tmp_path / "store", server=MemoryStateServer()) as store:
        await store.wait_model(NAME, ("node-0",))
        await store.load(NAME)


async def test_a_damaged_ledger_removes_nothing(tmp_path: Path):
    server = MemoryStateServer()
    async with running_store(tmp_path / "store", server=server) as store:
        await store.register(NAME, write_source(tmp_path / "src"))
    (tmp_path / "store/published.json").write_bytes(b"{")
    del server.entries[f"models/{NAME}"]
    async with running_store(tmp_path / "store", server=server) as store:
        await store.wait_model(NAME, ("node-0",))
