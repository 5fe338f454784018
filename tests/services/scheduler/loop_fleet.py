"""Schedulers on one cluster state in memory, with scripted links to workers."""

import asyncio
import contextlib

from gearfall.core.records import SchedulerRecord
from gearfall.infra.state.change_feed import Changes
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState, MemoryStateServer
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from services.scheduler.decision_log import DecisionLog
from services.scheduler.learned import WRITE_EVERY_S
from services.scheduler.loop import SchedulerLoop
from services.scheduler.service import SchedulerService
from tests.gearfall.scheduling.clusters import (
    model,
    node,
    worker,
)

NOW = 1_000.0
POLICY = SchedulerPolicy(keep_alive_s=60.0, min_residency_s=0.0)


class ScriptedLinks:
    """Links without connections; a test says who is out of reach."""

    def __init__(self) -> None:
        self.down: set[str] = set()
        self.followed: set[str] = set()
        self.on_change = lambda: None

    def follow(self, addresses, keep):
        self.followed = {*addresses, *(self.followed & set(keep))}

    def is_down(self, worker_id):
        return worker_id in self.down

    async def stop(self):
        self.followed = set()

    def set_down(self, *worker_ids):
        self.down = set(worker_ids)
        self.on_change()


class Fleet:
    """One in-memory cluster state with everything under one lease, and schedulers on it."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self.server = MemoryStateServer()
        self.stack = stack
        self.now = NOW
        self.links = ScriptedLinks()

    async def open(self):
        self.state = MemoryState(self.server)
        self.cluster = await self.connect(self.state)
        self.lease = await self.state.grant_lease(60.0)
        await self.cluster.put_node(node(), lease=self.lease)
        await self.cluster.put_worker(worker(), lease=self.lease)
        await self.cluster.put_model(model("small"))
        await self.cluster.put_model(model("large"))
        return self

    async def connect(self, state) -> Cluster:
        return await self.follow(Cluster(state))

    async def follow(self, cluster: Cluster) -> Cluster:
        await cluster.start()
        self.stack.push_async_callback(cluster.state.close)
        self.stack.push_async_callback(cluster.stop)
        return cluster

    async def scheduler(
        self,
        name="s1",
        policy=POLICY,
        decide=decide,
        cluster=None,
        learn_every_s=WRITE_EVERY_S,
        on_settled=lambda: None,
        on_left=lambda: None,
    ) -> SchedulerLoop:
        cluster = await self.follow(cluster or Cluster(MemoryState(self.server)))

        def make_links(on_change):
            self.links.on_change = on_change
            return self.links

        loop = SchedulerLoop(
            cluster,
            policy,
            decide=decide,
            clock=lambda: self.now,
            learn_every_s=learn_every_s,
            make_links=make_links,
            on_settled=on_settled,
            on_left=on_left,
        )
        loop.start(SchedulerRecord(name, f"127.0.0.1:{name[-1]}"))
        self.stack.push_async_callback(loop.stop)
        return loop

    def service(self, loop: SchedulerLoop) -> SchedulerService:
        """What a scheduler answers that has seen the cluster as it is now."""
        log = DecisionLog()
        log.take_in(Changes(self.cluster.view, (), self.cluster.revision))
        return SchedulerService(self.cluster, loop, log, "s1")

    async def until(self, holds):
        """Return once the view satisfies `holds`."""
        async with (
            asyncio.timeout(10),
            contextlib.aclosing(self.cluster.changes()) as changes,
        ):
            async for _ in changes:
                if holds(self.cluster.view):
                    return self.cluster.view
        raise AssertionError("the view ended")
