"""The router's record and its demand outlive a lost lease."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from gearfall.core.ids import ModelName, RouterId
from gearfall.core.records import RouterRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryLease, MemoryState, MemoryStateServer
from services.router.cluster.presence import Presence
from services.router.jobs.backlog import Backlog
from services.router.jobs.demand import DemandBoard

ROUTER = RouterId("router-a")
MODEL = ModelName("small")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster(MemoryState(MemoryStateServer()))
    await cluster.start()
    yield cluster
    await cluster.stop()


async def until_seen(cluster: Cluster, *, router: bool, demand: bool) -> None:
    async with asyncio.timeout(5):
        async for _ in cluster.changes():
            view = cluster.view
            if (ROUTER in view.routers, (MODEL, ROUTER) in view.demand) == (router, demand):
                return


async def until_under(cluster: Cluster, leases: Callable[[], list[MemoryLease]]) -> None:
    """Return when router and demand stand under the first of `leases`."""
    async with asyncio.timeout(5):
        async for _ in cluster.changes():
            entries = (await cluster.state.list("")).entries
            held = {entry.lease_id for entry in entries}
            if leases() and held == {leases()[0].lease_id} and len(entries) == 2:
                return


async def test_a_lost_lease_is_granted_again_with_all_that_stood_under_it(cluster):
    leases: list[MemoryLease] = []
    board = DemandBoard(cluster, ROUTER, is_ready=lambda _: False)

    def on_lease(lease: MemoryLease) -> None:
        leases.append(lease)
        board.set_lease(lease)

    presence = Presence(cluster, RouterRecord(ROUTER, "a:1", "a:2"), on_lease)  # type: ignore[arg-type]
    tasks = [asyncio.create_task(presence.run()), asyncio.create_task(board.run())]
    await until_seen(cluster, router=True, demand=False)
    board.set_waiting(MODEL, Backlog(3, 1.0))
    await until_seen(cluster, router=True, demand=True)
    assert cluster.view.demand[MODEL, ROUTER].waiting_jobs == 3
    leases[0].expire()
    await until_under(cluster, lambda: leases[1:])
    board.set_waiting(MODEL, Backlog())
    await until_seen(cluster, router=True, demand=False)
    await presence.stop()
    await until_seen(cluster, router=False, demand=False)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
