"""Deployments that a cluster state forgot, written back by the routers that remember them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gearfall.core.gears.gear_records import DriftRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState, MemoryStateServer
from services.router.cluster.restoring import LASTING, restore_what_is_lost
from tests.gearfall.infra.state.test_cluster import DEPLOYMENT, TINY, following

KEY = f"deployments/{DEPLOYMENT.name}"
DRIFT = DriftRecord(DEPLOYMENT.name, "small:0.5,large", 1, (0.75,), 1)


@pytest.fixture
async def server() -> AsyncIterator[MemoryStateServer]:
    """State that two routers follow, with a deployment in it."""
    made = MemoryStateServer()
    async with contextlib.AsyncExitStack() as stack:
        writer = await stack.enter_async_context(following(MemoryState(made)))
        await writer.put_model(TINY)
        await writer.put_deployment(DEPLOYMENT)
        await writer.put_drift(DRIFT)
        for _ in range(2):
            cluster = Cluster(MemoryState(made), lasting=LASTING)
            await cluster.start()
            stack.push_async_callback(cluster.stop)
            task = asyncio.create_task(restore_what_is_lost(cluster))
            stack.callback(task.cancel)
        yield made


async def test_a_wiped_state_gets_back_what_was_deployed_and_no_models(server: MemoryStateServer):
    async with following(MemoryState(server)) as observer:
        server.wipe()
        await observer.wait_until(lambda view: bool(view.deployments and view.drift))
        assert observer.view.deployments == {DEPLOYMENT.name: DEPLOYMENT}
        assert list(observer.view.drift.values()) == [DRIFT]
    assert sorted(server.entries) == [KEY, f"drift/{DRIFT.name}/{DRIFT.cascade}"]


async def test_what_another_wrote_meanwhile_stands(server: MemoryStateServer):
    server.stop()
    server.wipe()
    server.put(KEY, b"theirs", 0)
    server.start()
    async with following(MemoryState(server)) as observer:
        await observer.wait_seen(await observer.put_model(TINY))
    assert server.entries[KEY].value == b"theirs"


async def test_an_outage_or_a_compaction_writes_nothing(server: MemoryStateServer):
    revision = server.revision
    server.stop()
    server.start()
    server.compact()
    async with following(MemoryState(server)) as observer:
        await observer.wait_seen(revision)
    assert server.revision == revision
