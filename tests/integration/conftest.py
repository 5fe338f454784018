"""One real etcd and one real Redis for the session; harnesses for fakes and real ones alike."""

import itertools
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

import pytest

from gearfall.core.ids import ModelName
from gearfall.core.ports import ClusterState, JobQueue
from gearfall.infra.local.local_servers import LocalServer, start_etcd, start_redis
from gearfall.infra.queue.memory_queue import MemoryQueue, MemoryQueueServer
from gearfall.infra.queue.redis_queue import RedisQueue
from gearfall.infra.state.etcd_rpc import invoke, rpc
from gearfall.infra.state.etcd_state import EtcdState
from gearfall.infra.state.memory_state import MemoryState, MemoryStateServer

_numbers = itertools.count()


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    server = start_etcd(tmp_path_factory.mktemp("etcd"), is_durable=False)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


class StateHarness(Protocol):
    """A state server with the faults that the port promises to survive."""

    def connect(self, timeout_s: float = 1.5) -> ClusterState: ...
    def stop(self) -> None: ...
    def start(self) -> None: ...
    def wipe_while_stopped(self) -> None: ...
    async def compact(self) -> None: ...


class QueueHarness(Protocol):
    """A queue server with the faults that the port promises to survive."""

    def connect(self) -> JobQueue: ...
    def stop(self) -> None: ...
    def start(self) -> None: ...
    async def flush(self) -> None: ...
    async def forget_from_now(self) -> None: ...
    async def set_full(self, is_full: bool) -> None: ...
    async def append_malformed(self, model: ModelName) -> str: ...


class MemoryStateHarness:
    def __init__(self) -> None:
        self.server = MemoryStateServer()
        self.clients: list[ClusterState] = []

    def connect(self, timeout_s: float = 1.5) -> MemoryState:
        self.clients.append(client := MemoryState(self.server))
        return client

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server.start()

    def wipe_while_stopped(self) -> None:
        self.server.wipe()

    async def compact(self) -> None:
        self.server.compact()


class EtcdHarness:
    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.prefix = f"/test/{next(_numbers)}/"
        self.clients: list[ClusterState] = []

    def connect(self, timeout_s: float = 1.5) -> EtcdState:
        client = EtcdState(self.server.url, prefix=self.prefix, timeout_s=timeout_s)
        self.clients.append(client)
        return client

    def stop(self) -> None:
        self.server.kill()

    def start(self) -> None:
        self.server.start()

    def wipe_while_stopped(self) -> None:
        shutil.rmtree(self.server.spec.directory / "etcd")

    async def compact(self) -> None:
        client = self.connect()
        revision = (await client.list("")).revision
        request = rpc.CompactionRequest(revision=revision, physical=True)
        await invoke(client._stubs.kv.Compact, request, timeout_s=5.0)


class MemoryQueueHarness:
    def __init__(self) -> None:
        self.server = MemoryQueueServer()
        self.clients: list[JobQueue] = []

    def connect(self) -> MemoryQueue:
        self.clients.append(client := MemoryQueue(self.server))
        return client

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server.start()

    async def flush(self) -> None:
        self.server.flush()

    async def forget_from_now(self) -> None:
        self.server.forget_from_now()

    async def set_full(self, is_full: bool) -> None:
        self.server.is_full = is_full

    async def append_malformed(self, model: ModelName) -> str:
        return self.server.append_malformed(model)


class RedisHarness:
    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.prefix = f"test:{next(_numbers)}:"
        self.clients: list[JobQueue] = []

    def connect(self) -> RedisQueue:
        self.clients.append(client := RedisQueue(self.server.url, key_prefix=self.prefix))
        return client

    def stop(self) -> None:
        self.server.kill()

    def start(self) -> None:
        self.server.start()

    async def flush(self) -> None:
        await self.connect()._redis.flushall()

    async def forget_from_now(self) -> None:
        """Its log ends here, as if what follows had not reached the disk when it dies."""
        await self.connect()._redis.config_set("appendonly", "no")

    async def set_full(self, is_full: bool) -> None:
        await self.connect()._redis.config_set("maxmemory", 1 if is_full else 0)

    async def append_malformed(self, model: ModelName) -> str:
        key, fields = self.prefix + model, {b"job": b"\xff\xff not a job"}
        entry_id: bytes = await self.connect()._redis.xadd(key, fields)
        return entry_id.decode()


@pytest.fixture(params=["memory", "etcd"])
async def states(request: pytest.FixtureRequest) -> AsyncIterator[StateHarness]:
    """The contract's subject: the fake, then the real one."""
    harness: MemoryStateHarness | EtcdHarness
    if request.param == "memory":
        harness = MemoryStateHarness()
    else:
        harness = EtcdHarness(request.getfixturevalue("etcd_server"))
    yield harness
    for client in harness.clients:
        await client.close()


@pytest.fixture(params=["memory", "redis"])
async def queues(request: pytest.FixtureRequest) -> AsyncIterator[QueueHarness]:
    """The contract's subject: the fake, then the real one."""
    harness: MemoryQueueHarness | RedisHarness
    if request.param == "memory":
        harness = MemoryQueueHarness()
    else:
        harness = RedisHarness(request.getfixturevalue("redis_server"))
    yield harness
    for client in harness.clients:
        await client.close()
