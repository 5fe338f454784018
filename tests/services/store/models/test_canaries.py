"""Canaries of a store: computed once, from the source, kept with the checkpoint, given to all."""

import asyncio
import shutil

import pytest

from gearfall.core.errors import CorruptCheckpoint, InvalidRequest, NotFound, Unavailable
from gearfall.core.generation.canary import Canary, CanaryToken, canary_bytes, parse_canary
from gearfall.core.records import NodeRecord
from gearfall.infra.state.cluster_keys import decode_entry, key_of
from gearfall.pb import store_pb2 as pb
from services.store.models.canaries import CANARY_FILE
from services.store.models.canary_process import CanaryProcess, CanaryRequest
from tests.services.store.source_directories import write_source
from tests.services.store.stores import running_store
from tests.services.worker.tiny_checkpoints import random_model

CANARY = Canary((1, 2), (CanaryToken(3, -0.5, 1.0, 0.001),))


class Scripted:
    """Computes what the test says, when it says so."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.directories: list[str] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def __call__(self, request, size_bytes):
        self.directories.append(request.directory)
        await self.may_go_on.wait()
        if self.failures:
            raise self.failures.pop(0)
        return CANARY


async def read_canary(store, model="m"):
    return (await store.call("ReadCanary", pb.ReadCanaryRequest(model=model))).content


async def test_it_is_computed_once_from_the_source_and_survives_the_store(tmp_path):
    compute = Scripted()
    compute.may_go_on.clear()
    source = write_source(tmp_path / "src")
    async with running_store(tmp_path / "store", compute_canary=compute) as store:
        await store.register("m", source)
        readers = [asyncio.create_task(read_canary(store)) for _ in range(3)]
        await asyncio.sleep(0)
        compute.may_go_on.set()
        assert await asyncio.gather(*readers) == [canary_bytes(CANARY)] * 3
    shutil.rmtree(source)
    async with running_store(tmp_path / "store", compute_canary=compute) as store:
        assert await read_canary(store) == canary_bytes(CANARY)
    assert compute.directories == [str(source)]


async def test_the_node_says_whose_canary_a_first_start_would_wait_for(tmp_path):
    compute = Scripted()
    compute.may_go_on.clear()

    async with running_store(tmp_path / "store", compute_canary=compute) as store:
        await store.register("m", write_source(tmp_path / "src"))
        # Said by the time that the registration is: nobody asks for the model before.
        key = key_of("nodes", store.node_id)
        entry = await store.state.get(key)
        assert entry is not None
        node = decode_entry(key, entry.value)[2]
        assert isinstance(node, NodeRecord)
        assert node.preparing == ("m",)
        compute.may_go_on.set()
        await store.wait_until(lambda: store.cluster.view.nodes[store.node_id].preparing == ())
        assert await read_canary(store) == canary_bytes(CANARY)


async def test_one_that_was_never_recorded_is_computed_from_the_checkpoint(tmp_path):
    compute = Scripted(Unavailable("it died"))
    async with running_store(tmp_path / "store", compute_canary=compute) as store:
        await store.register("m", write_source(tmp_path / "src"))
        await asyncio.gather(*store.service._canaries._work.values(), return_exceptions=True)
        assert parse_canary(await read_canary(store)) == CANARY
    assert compute.directories[1:] == [str(tmp_path / "store/models/m")]


async def test_a_model_that_transformers_cannot_run_has_none(tmp_path):
    compute = Scripted(InvalidRequest("no such layer"), InvalidRequest("no such layer"))
    async with running_store(tmp_path / "store", compute_canary=compute) as store:
        await store.register("m", write_source(tmp_path / "src"))
        with pytest.raises(InvalidRequest, match="'m': no such layer"):
            await read_canary(store)
        with pytest.raises(NotFound):
            await read_canary(store, "other")


async def test_a_damaged_canary_is_no_canary(tmp_path):
    async with running_store(tmp_path / "store", compute_canary=Scripted()) as store:
        await store.register("m", write_source(tmp_path / "src"))
        await read_canary(store)
        (tmp_path / "store/models/m" / CANARY_FILE).write_bytes(b"{}")
        with pytest.raises(CorruptCheckpoint, match="m: the canary"):
            await read_canary(store)


async def test_a_model_removed_meanwhile_leaves_nothing(tmp_path):
    compute = Scripted()
    compute.may_go_on.clear()
    async with running_store(tmp_path / "store", compute_canary=compute) as store:
        await store.register("m", write_source(tmp_path / "src"))
        reader = asyncio.create_task(read_canary(store))
        await asyncio.sleep(0)
        await store.call("DeleteModel", pb.DeleteModelRequest(model="m"))
        compute.may_go_on.set()
        with pytest.raises((NotFound, Unavailable)):
            await reader
        assert not (tmp_path / "store/models/m").exists()


async def test_the_process_computes_refuses_and_comes_back(tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path / "good")
    write_source(tmp_path / "bad")
    process = CanaryProcess(idle_s=3600)

    def request(name):
        return CanaryRequest(str(tmp_path / name), 67, 1, 256)

    try:
        canary = await process.compute(request("good"), 1)
        assert len(canary.answer) == 4
        with pytest.raises(InvalidRequest, match="transformers can't run"):
            await process.compute(request("bad"), 1)
        warm = process.pid
        assert await process.compute(request("good"), 1) == canary
        assert process.pid == warm is not None
    finally:
        await process.stop()
    assert process.pid is None
