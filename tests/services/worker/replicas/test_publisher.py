"""What reaches cluster state of what a worker says about its replicas, and when."""

import asyncio
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

import pytest

from gearfall.core.records import ReplicaRecord, ReplicaState
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState
from services.worker.replicas.publisher import ReplicaPublisher
from services.worker.replicas.workload import KV_INTERVAL_S, KV_STEP
from tests.services.worker.fakes import MODEL, NODE, WORKER

KEY = (WORKER, MODEL)
READY = ReplicaRecord(WORKER, NODE, MODEL, ReplicaState.READY, 2, 0, 1, 64, 5.0)


class Board:
    def __init__(self, stack):
        self.stack = stack
        self.state = MemoryState()
        self.cluster = Cluster(self.state)
        self.now = 0.0

    async def open(self, coalesce_s):
        await self.cluster.start()
        self.stack.push_async_callback(self.state.close)
        self.stack.push_async_callback(self.cluster.stop)
        self.publisher = ReplicaPublisher(
            self.cluster, WORKER, coalesce_s=coalesce_s, monotonic=lambda: self.now
        )
        self.publisher.start()
        self.stack.push_async_callback(self.publisher.stop)
        return self

    async def until(self, holds):
        async with asyncio.timeout(5), aclosing(self.cluster.changes()) as changes:
            async for _ in changes:
                if holds(self.cluster.view.replicas):
                    return


@pytest.fixture
async def board():
    async with AsyncExitStack() as stack:
        yield await Board(stack).open(coalesce_s=0.02)


async def test_nothing_is_written_before_there_is_a_lease(board):
    board.publisher.publish(READY)
    board.publisher.use_lease(await board.state.grant_lease(60))
    await board.until(lambda replicas: replicas.get(KEY) == READY)


async def test_idle_and_busy_are_coalesced_but_a_change_of_state_is_not(board):
    board.publisher.use_lease(await board.state.grant_lease(60))
    board.publisher.publish(READY)
    await board.until(lambda replicas: replicas.get(KEY) == READY)
    before = board.state.server.revision
    for index in range(50):
        board.publisher.publish(replace(READY, idle_since_unix_s=float(index)))
    draining = replace(READY, state=ReplicaState.DRAINING)
    board.publisher.publish(draining)
    await board.until(lambda replicas: replicas.get(KEY) == draining)
    assert board.state.server.revision == before + 1


async def test_the_last_of_many_changes_is_written_in_the_end(board):
    board.publisher.use_lease(await board.state.grant_lease(60))
    board.publisher.publish(READY)
    await board.until(lambda replicas: replicas.get(KEY) == READY)
    last = replace(READY, idle_since_unix_s=99.0)
    board.publisher.publish(replace(READY, idle_since_unix_s=0.0))
    board.publisher.publish(last)
    board.now = 1.0
    await board.until(lambda replicas: replicas.get(KEY) == last)


async def test_withdrawn_means_gone_and_a_later_record_stands(board):
    board.publisher.use_lease(await board.state.grant_lease(60))
    board.publisher.publish(READY)
    await board.until(lambda replicas: KEY in replicas)
    board.publisher.withdraw(MODEL)
    await board.until(lambda replicas: KEY not in replicas)
    assert board.publisher.records() == ()
    board.publisher.publish(READY)
    await board.until(lambda replicas: KEY in replicas)


async def test_a_new_lease_brings_everything_back(board):
    first = await board.state.grant_lease(60)
    board.publisher.use_lease(first)
    board.publisher.publish(READY)
    await board.until(lambda replicas: KEY in replicas)
    first.expire()
    await board.until(lambda replicas: KEY not in replicas)
    board.publisher.use_lease(await board.state.grant_lease(60))
    await board.until(lambda replicas: replicas.get(KEY) == READY)


async def test_memory_that_fills_up_is_told_before_other_news_are_due():
    async with AsyncExitStack() as stack:
        board = await Board(stack).open(coalesce_s=1000.0)
        board.publisher.use_lease(await board.state.grant_lease(60))
        board.publisher.publish(READY)
        await board.until(lambda replicas: replicas.get(KEY) == READY)
        little = replace(READY, kv_share=KV_STEP / 2)
        board.publisher.publish(little)
        assert board.publisher._wait_s(MODEL, little) == pytest.approx(1000.0)
        full = replace(READY, kv_share=0.95)
        assert board.publisher._wait_s(MODEL, full) == pytest.approx(KV_INTERVAL_S)
        board.now += KV_INTERVAL_S
        board.publisher.publish(full)
        await board.until(lambda replicas: replicas.get(KEY) == full)
