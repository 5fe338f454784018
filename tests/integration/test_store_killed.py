"""A store killed with -9 in each phase of a load comes back whole and loads."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from gearfall.core.errors import Unavailable
from gearfall.infra.local.local_servers import LocalServer
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.pb import store_pb2 as pb
from gearfall.pb.store_pb2_grpc import StoreStub
from tests.gearfall.infra.web_servers import web_server
from tests.integration.test_store_process import TIMEOUT_S, StoreProcess, store_process
from tests.services.store.checkpoints import many_tensors, write_checkpoint
from tests.services.store.stores import collect


async def load_until_killed(store: StoreProcess, asked: threading.Event) -> None:
    async with open_channel(store.ready["address"]) as channel:
        request = pb.LoadModelRequest(model="m")
        call = StoreStub(channel).LoadModel(request, timeout=TIMEOUT_S)
        loading = asyncio.ensure_future(collect(call))
        assert await asyncio.to_thread(asked.wait, TIMEOUT_S)
        store.process.kill()
        await store.process.wait()
        with pytest.raises(Unavailable):
            await loading


@pytest.mark.parametrize("phase", ["manifest.json", "config.json", "partition-0.bin"])
async def test_a_store_killed_in_a_phase_of_a_load(
    etcd_server: LocalServer, tmp_path: Path, phase: str
):
    write_checkpoint(tmp_path / "model", many_tensors(9))
    with web_server(tmp_path / "model") as web:
        async with store_process(etcd_server.url, tmp_path / "data") as store:
            await store.call("RegisterModel", pb.RegisterModelRequest(name="m", path=web.url))
            web.faults.stall, web.faults.stall_file = threading.Event(), phase
            await load_until_killed(store, web.faults.stalled)
        web.faults.stall.set()
        async with store_process(etcd_server.url, tmp_path / "data") as store:
            assert os.listdir(tmp_path / "data/models") == []  # noqa: PTH208
            done = (await store.call("LoadModel", pb.LoadModelRequest(model="m")))[-1]
            assert done.done
            content = (tmp_path / "data/models/m/partition-0.bin").read_bytes()
            assert content == (tmp_path / "model/partition-0.bin").read_bytes()
            async with open_channel(store.ready["address"]) as channel:
                request = pb.DeleteModelRequest(model="m")
                await StoreStub(channel).DeleteModel(request, timeout=TIMEOUT_S)
