"""A whole worker: state and queue in memory, scripted engines, a router over gRPC."""

import asyncio
from contextlib import AsyncExitStack, aclosing

from gearfall.core.ids import ModelName
from gearfall.core.ports import Lease
from gearfall.core.records import (
    AssignmentRecord,
    ReplicaState,
    RouterRecord,
    SchedulerRecord,
)
from gearfall.infra.queue.memory_queue import MemoryQueue
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.election import campaign
from gearfall.infra.state.memory_state import MemoryState
from services.worker.gear_rules import GearRules
from services.worker.host import WorkerHost
from services.worker.jobs.job_board import JobBoard
from services.worker.jobs.push_stream import PushStream
from services.worker.jobs.settlement import Settlement
from services.worker.migration.desk import MigrationDesk
from services.worker.migration.evacuation import Evacuation
from services.worker.registration import Registration
from services.worker.replicas.publisher import ReplicaPublisher
from services.worker.replicas.replica import Replica, ReplicaPorts
from services.worker.replicas.replica_start import ReplicaSettings, StartPorts
from tests.services.worker.fakes import (
    MODEL,
    NODE,
    ROUTER,
    WORKER,
    FakeRouter,
    FakeSpawner,
    FakeStore,
    job,
    model_record,
    worker_record,
)

SLOTS = 2
KEY = (WORKER, MODEL)


class Site:
    """One worker with everything around it."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack
        self.state = MemoryState()
        self.queue = MemoryQueue()
        self.store = FakeStore()
        self.spawner = FakeSpawner()
        self.leases: list[Lease] = []
        self.now = 1000.0

    async def open(self) -> "Site":
        self.cluster = Cluster(self.state)
        await self.cluster.start()
        self.stack.push_async_callback(self.state.close)
        self.stack.push_async_callback(self.cluster.stop)
        self.lease = await self.state.grant_lease(60.0)
        leader = SchedulerRecord("s1", "127.0.0.1:1")
        self.fence = await campaign(self.state, leader, self.lease)
        await self.cluster.put_model(model_record())
        self.router = await FakeRouter().start(self.stack)
        record = RouterRecord(ROUTER, self.router.address, "")
        await self.cluster.put_router(record, lease=self.lease)
        await self._start_worker()
        return self

    async def _start_worker(self) -> None:
        settlement = Settlement(self.queue)
        self.board = JobBoard(
            settlement,
            lambda address, listener: PushStream(address, WORKER, NODE, listener),
            lambda router: router in self.cluster.view.routers,
        )
        publisher = ReplicaPublisher(self.cluster, WORKER, coalesce_s=0.01)
        ports = ReplicaPorts(
            StartPorts(self.store, self.store.take_lease, self.spawner),
            self.queue,
            self.board,
            publisher,
            lambda: frozenset(self.cluster.view.workers),
            clock=lambda: self.now,
            evacuate=lambda model: Evacuation(self.cluster, self.desk, WORKER, model),
            move_cost=lambda model: self.desk.move_cost(model),  # noqa: PLW0108 - made further down
            claim_rule=GearRules(self.cluster, WORKER).rule_for,
        )
        settings = ReplicaSettings(WORKER, NODE, "cpu", SLOTS, 1, claim_block_s=0.02)

        def on_lease(lease) -> None:
            self.leases.append(lease)
            publisher.use_lease(lease)

        self.registration = Registration(
            self.cluster, on_lease, before=publisher.write_under, retry_s=0.01
        )
        self.host = WorkerHost(
            self.cluster, self.registration, lambda a, m: Replica(a, m, settings, ports)
        )
        self.desk = MigrationDesk(self.board, self.host, WORKER, host="127.0.0.1")
        settlement.start()
        publisher.start()
        self.stack.push_async_callback(settlement.stop)
        self.stack.push_async_callback(self.board.stop, timeout_s=0.0)
        self.stack.push_async_callback(publisher.stop)
        await self.host.start(worker_record())
        self.stack.push_async_callback(self.host.stop, 0.0)

    async def assign(self, model=MODEL) -> None:
        record = AssignmentRecord(WORKER, ModelName(model), 64, "test", self.now - 0.5)
        await self.cluster.put_assignment(record, fence=self.fence)

    async def unassign(self, model=MODEL) -> None:
        await self.cluster.delete_assignment(WORKER, ModelName(model), fence=self.fence)

    async def until(self, holds):
        """Return the view once it satisfies `holds`."""
        async with asyncio.timeout(10), aclosing(self.cluster.changes()) as changes:
            async for _ in changes:
                if holds(self.cluster.view):
                    return self.cluster.view
        raise AssertionError("the view ended")

    async def replica(self, state: ReplicaState, model=MODEL):
        key = (WORKER, model)
        view = await self.until(lambda v: key in v.replicas and v.replicas[key].state is state)
        return view.replicas[key]

    async def ready(self):
        await self.assign()
        await self.replica(ReplicaState.READY)
        return await self.spawner.engine(0)

    async def send(self, name="job-1", **fields):
        a_job = job(name, address=self.router.address, **fields)
        await self.queue.append(a_job)
        return a_job

    async def running(self, engine, name="job-1", **fields):
        a_job = await self.send(name, **fields)
        await engine.until(lambda: (a_job.job_id, a_job.epoch) in engine.submitted)
        await self.router.until(lambda: (a_job.job_id, a_job.epoch) in self.router.claims)
        return a_job
