"""What a router says that can't be done now."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from gearfall.core.errors import Unavailable
from gearfall.core.ids import NodeId, RouterId, WorkerId
from gearfall.core.records import SchedulerRecord, WorkerRecord
from gearfall.infra.queue.memory_queue import MemoryQueue
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.infra.state.memory_state import MemoryState
from services.router.cluster.cluster_status import ClusterStatus
from services.router.cluster.peers import Peers
from tests.gearfall.scheduling.clusters import node

WORKER = WorkerRecord(WorkerId("w"), NodeId("node-1"), "127.0.0.1:1", "cpu", 2**30, 1)
WHOLE = ClusterView(
    workers={WORKER.worker_id: WORKER},
    nodes={NodeId("node-1"): node("node-1")},
    leader=SchedulerRecord("s", "127.0.0.1:2"),
)


class FullState(MemoryState):
    """Answers reads and takes no writes, as an etcd whose quota is used up."""

    async def compare_and_set(self, *_: object, **__: object) -> int:
        raise Unavailable("etcd: mvcc: database space exceeded")


class CountingState(MemoryState):
    """Counts the writes that it is asked for."""

    writes = 0

    async def compare_and_set(self, key: str, value: bytes, **kwargs: Any) -> int:
        self.writes += 1
        return await super().compare_and_set(key, value, **kwargs)


@asynccontextmanager
async def status_of(
    state: MemoryState, view: ClusterView, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[ClusterStatus]:
    peers = Peers(lambda: view)
    yield ClusterStatus(
        router_id=RouterId("r"),
        view=lambda: view,
        state=state,
        queue=MemoryQueue(),
        peers=peers,
        waiting=dict,
        running_requests=int,
        alarms=list,
        costs={},
        clock=clock,
    )
    await peers.close()
    await state.close()


async def words_of(make_state: Callable[[], MemoryState], view: ClusterView) -> list[str]:
    async with status_of(make_state(), view) as status:
        return await status.degraded()


async def test_a_whole_cluster_has_nothing_to_say():
    assert await words_of(MemoryState, WHOLE) == []


async def test_state_that_takes_no_writes_is_told_and_goes_on_being_read():
    async with status_of(FullState(), WHOLE) as status:
        (words,) = await status.degraded()
        assert "takes no writes" in words
        assert "database space exceeded" in words
        assert "writes" not in str(await status.unreachable()), "warm traffic goes on"
        assert await status.reachable() == {"state": True, "writes": False, "queue": True}


async def test_one_probe_serves_all_who_ask_within_a_second():
    state, now_s = CountingState(), 5.0
    async with status_of(state, WHOLE, lambda: now_s) as status:
        found = await asyncio.gather(*(status.reachable() for _ in range(10)))
        now_s = 5.9
        assert [*found, await status.reachable()] == [
            {"state": True, "writes": True, "queue": True}
        ] * 11
        assert state.writes == 1
        state.server.stop()
        now_s = 6.0
        assert not (await status.reachable())["state"]
        assert state.writes == 2


async def test_state_that_is_away_is_told_once():
    def stopped() -> MemoryState:
        state = MemoryState()
        state.server.stop()
        return state

    (words,) = await words_of(stopped, WHOLE)
    assert "can't be reached" in words


async def test_workers_of_a_node_without_a_store_are_told():
    stray = WorkerRecord(WorkerId("x"), NodeId("nowhere"), "127.0.0.1:3", "cpu", 2**30, 1)
    view = ClusterView(
        workers={**WHOLE.workers, stray.worker_id: stray}, nodes=WHOLE.nodes, leader=WHOLE.leader
    )
    assert await words_of(MemoryState, view) == ["node nowhere has workers and no store"]
