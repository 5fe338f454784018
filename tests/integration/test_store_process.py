"""The store as a process against a real etcd: ready line, kill -9, restart, orderly end."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gearfall.core.errors import Unavailable
from gearfall.infra.local.local_servers import LocalServer
from gearfall.infra.memory.pool_lease import map_partition, take_lease
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.etcd_state import EtcdState
from gearfall.pb import store_pb2 as pb
from gearfall.pb.store_pb2_grpc import StoreStub
from tests.services.store.source_directories import write_source
from tests.services.store.stores import collect

TIMEOUT_S = 30.0


@dataclass
class StoreProcess:
    process: asyncio.subprocess.Process
    ready: dict[str, Any]

    async def call(self, method: str, request: Any) -> list[Any]:
        async with open_channel(self.ready["address"]) as channel:
            return await collect(getattr(StoreStub(channel), method)(request, timeout=TIMEOUT_S))


@contextlib.asynccontextmanager
async def store_process(etcd_url: str, directory: Path) -> AsyncIterator[StoreProcess]:
    flags = ["--etcd", etcd_url, "--node-id", "proc", "--data-dir", str(directory)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.store", *flags, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            yield StoreProcess(process, json.loads(await process.stdout.readline()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_killed_store_comes_back_with_its_models(etcd_server: LocalServer, tmp_path: Path):
    state = EtcdState(etcd_server.url, prefix="/gearfall/v1/")
    cluster = Cluster(state)
    await cluster.start()
    source = write_source(tmp_path / "src")
    async with store_process(etcd_server.url, tmp_path / "data") as store:
        registered = await store.call(
            "RegisterModel", pb.RegisterModelRequest(name="killed", path=str(source))
        )
        done = (await store.call("LoadModel", pb.LoadModelRequest(model="killed")))[-1]
        lease = await take_lease(done.attach_socket, "killed", done.digest, "test")
        mapping = map_partition(lease.partition_fds[0], lease.partition_sizes[0])
        content = mapping[:]
        store.process.kill()
        await store.process.wait()
    (tmp_path / "data/models/.incoming-killed-x").mkdir()

    async with store_process(etcd_server.url, tmp_path / "data") as store:
        with pytest.raises(Unavailable):
            await take_lease(done.attach_socket, "killed", done.digest, "test")
        again = (await store.call("LoadModel", pb.LoadModelRequest(model="killed")))[-1]
        assert again.digest == done.digest == registered[-1].model.digest
        assert not (tmp_path / "data/models/.incoming-killed-x").exists()
        assert mapping[:] == content
        lease.close()
        async for _ in cluster.changes():
            node = cluster.view.nodes.get(store.ready["node_id"])
            if node and node.address == store.ready["address"] and node.resident:
                break
        store.process.send_signal(signal.SIGTERM)
        assert await store.process.wait() == 0
        assert await state.get("nodes/proc") is None
    record = cluster.view.models[registered[-1].model.name]
    assert record.nodes == ("proc",)
    await cluster.delete_model(record.name)
    await cluster.stop()
    await state.close()
