"""From what comes to a router, over the leader's wish, to bytes in a real store's memory."""

import asyncio
import contextlib
import time
from pathlib import Path

from gearfall.core.ids import ModelName, RouterId
from gearfall.core.records import SchedulerRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState, MemoryStateServer
from gearfall.scheduling.prefetching.prefetch import PrefetchPolicy
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from services.router.jobs.load_board import LoadBoard
from services.scheduler.loop import SchedulerLoop
from tests.gearfall.infra.metric_samples import samples_of
from tests.services.store.source_directories import write_source
from tests.services.store.stores import running_store

NAME = ModelName("tiny")
EAGER = SchedulerPolicy(
    prefetch=PrefetchPolicy(every_s=0.05, least_gain_s=0.0, least_use=0.01, patience_s=30.0)
)


async def test_what_is_asked_for_comes_to_memory_and_the_wish_goes(tmp_path: Path):
    server = MemoryStateServer()
    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(running_store(tmp_path / "s", server=server))
        await store.register(NAME, write_source(tmp_path / "src"))
        cluster = Cluster(MemoryState(server))
        await cluster.start()
        stack.push_async_callback(cluster.stop)
        loop = SchedulerLoop(cluster, EAGER, clock=time.time)
        loop.start(SchedulerRecord("s1", "127.0.0.1:1"))
        stack.push_async_callback(loop.stop)

        board = LoadBoard(cluster, RouterId("router-a"), every_s=0.05)
        writing = asyncio.create_task(board.run())
        stack.callback(writing.cancel)
        board.set_lease(await cluster.grant_lease(60.0))
        board.arrived(NAME, 5)
        board.ended(NAME)
        await store.wait_node(resident=(NAME,))
        await store.wait_until(lambda: not store.cluster.view.prefetch)
        samples = samples_of(store.service.render_metrics())
        assert samples["gearfall_store_wishes_total", "brought"] == 1
