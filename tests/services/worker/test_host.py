"""A whole worker host: cluster state and queue in memory, scripted engines, a router over gRPC."""

import asyncio
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

import pytest

from gearfall.core.errors import CorruptCheckpoint, Unavailable
from gearfall.core.gear_plan import Gear, GearPlan, PlacedReplicas, Promise, plan_text
from gearfall.core.gear_records import GearPlanRecord
from gearfall.core.ids import DeploymentName, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.job import Priority
from gearfall.core.memory import kv_capacity_tokens
from gearfall.core.ports import Lease, QueueDepth
from gearfall.core.records import (
    AssignmentRecord,
    ReplicaRecord,
    ReplicaState,
    RouterRecord,
    RunningJob,
    SchedulerRecord,
    Stage,
    Tier,
)
from gearfall.infra.cluster import Cluster
from gearfall.infra.election import campaign
from gearfall.infra.memory_queue import MemoryQueue
from gearfall.infra.memory_state import MemoryState
from services.worker.engine_link.messages import StopEngine
from services.worker.gear_rules import GearRules
from services.worker.host import WorkerHost
from services.worker.jobs.job_board import JobBoard
from services.worker.jobs.job_follower import submission
from services.worker.jobs.push_stream import PushStream
from services.worker.jobs.settlement import Settlement
from services.worker.migration.cost import DataPath, Sample
from services.worker.migration.desk import MigrationDesk
from services.worker.migration.evacuation import Evacuation
from services.worker.registration import Registration
from services.worker.replicas.publisher import ReplicaPublisher
from services.worker.replicas.replica import Replica, ReplicaPorts
from services.worker.replicas.replica_start import ReplicaSettings, StartPorts
from tests.services.worker.fakes import (
    FINISH,
    MODEL,
    NODE,
    ROUTER,
    WORKER,
    FakeRouter,
    FakeSpawner,
    FakeStore,
    job,
    model_record,
    run_of,
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


@pytest.fixture
async def site():
    async with AsyncExitStack() as stack:
        yield await Site(stack).open()


async def lose_memory(site) -> None:
    """Wipe cluster state under everybody, as a server that comes back with an empty disk."""
    site.state.server.wipe()
    lease = await site.state.grant_lease(60.0)
    site.fence = await campaign(site.state, SchedulerRecord("s2", "127.0.0.1:1"), lease)
    await site.cluster.put_model(model_record())


async def test_a_replica_serves_on_when_cluster_state_lost_its_memory(site):
    engine = await site.ready()
    a_job = await site.running(engine)
    await lose_memory(site)
    view = await site.until(lambda v: KEY in v.replicas and v.replicas[KEY].is_adrift)
    assert view.replicas[KEY].state is ReplicaState.READY
    view = await site.until(lambda v: WORKER in v.workers)
    assert view.replicas[KEY].is_adrift, "who sees the worker sees what it hosts"
    site.now = 1234.0
    engine.step(run_of(a_job, 0, finish=FINISH))
    await site.until(lambda v: v.replicas[KEY].idle_since_unix_s == 1234.0)
    await site.assign()
    await site.until(lambda v: not v.replicas[KEY].is_adrift)
    assert (KEY in site.cluster.view.replicas, len(site.spawner.starts)) == (True, 1)
    await site.unassign()
    await site.until(lambda v: KEY not in v.replicas)


async def test_an_assignment_becomes_a_ready_replica_with_a_timeline(site):
    await site.ready()
    record = site.cluster.view.replicas[KEY]
    assert (record.pid, record.slots, record.memory_bytes) == (100, SLOTS, 64)
    assert record.idle_since_unix_s == site.now
    timeline = record.timeline
    assert timeline.from_tier is Tier.DRAM
    assert (timeline.ssd_s, timeline.build_s, timeline.first_token_s) == (0.2, 0.02, 0.03)
    assert timeline.attach_s >= 0.01
    assert timeline.queued_s >= 0.5
    assert site.store.wanted_unix_s == [site.cluster.view.assignments[KEY].assigned_unix_s]
    assert timeline.total_s >= timeline.queued_s
    (start,) = site.spawner.starts
    assert start.kv_tokens == kv_capacity_tokens(model_record(), SLOTS)
    assert start.config_json
    assert start.generation_config_json == b""


@pytest.mark.parametrize("needs_pool", [True, False])
async def test_the_lease_lasts_for_as_long_as_the_engine_computes_over_it(site, needs_pool):
    site.spawner.needs_pool = needs_pool
    engine = await site.ready()
    (lease,) = site.store.leases
    assert lease.is_closed != needs_pool
    await site.running(engine)


async def test_an_engine_is_told_which_jobs_wait_and_they_stay_in_the_queue_until_it_is_ready(site):
    site.spawner.failures.append(CorruptCheckpoint("wrong canary"))
    waiting = [await site.send(f"job-{number}") for number in range(SLOTS + 1)]
    await site.assign()
    engine = await site.spawner.engine(1)  # the first one failed
    for start in site.spawner.starts:
        assert start.expected == tuple(map(submission, waiting[:SLOTS]))
    assert not (await site.spawner.engine(0)).sent
    await engine.until(lambda: len(engine.submitted) == SLOTS)
    assert engine.submitted == [(each.job_id, each.epoch) for each in waiting[:SLOTS]]
    assert not site.router.lost
    assert await site.queue.depth(MODEL) == QueueDepth(waiting=1, claimed=SLOTS)


async def test_an_engine_starts_while_the_queue_is_out_of_reach(site):
    await site.send()
    site.queue.server.stop()
    await site.ready()
    assert [start.expected for start in site.spawner.starts] == [()]


async def test_claims_no_more_jobs_than_slots_and_goes_on_when_one_frees(site):
    engine = await site.ready()
    first = await site.running(engine, "job-1")
    await site.running(engine, "job-2")
    await site.send("job-3")
    engine.step(run_of(first, 0))
    await site.router.until(lambda: site.router.steps)
    assert (await site.queue.depth(MODEL)).waiting == 1
    engine.step(run_of(first, 1, finish=FINISH))
    await engine.until(lambda: ("job-3", 1) in engine.submitted)
    site.router.reply_finished(first)


async def put_plan(site, **gear) -> None:
    """A plan of one gear over the model, in force at once."""
    promise = Promise(0.9, 0.0, 0.1, 0, 1.0, 0.0, (1.0,))
    plan = GearPlan(
        *("chat", 1, 1.0, "a test", "FLOP", {str(MODEL): ""}),
        gears=(Gear(1e6, (Stage(MODEL),), promise, **gear),),
        placement=(PlacedReplicas(str(NODE), str(MODEL), 1),),
    )
    record = GearPlanRecord(DeploymentName("chat"), 1, plan_text(plan))
    await site.cluster.wait_seen(await site.cluster.put_gear_plan(record))


async def test_a_batch_begins_when_the_gears_trigger_is_reached(site):
    """Without a plan the first job would be claimed alone."""
    await put_plan(site, triggers={str(MODEL): 2})
    engine = await site.ready()
    claims: list[int] = []
    claim = site.queue.claim

    async def counted(*arguments, **named):
        jobs = await claim(*arguments, **named)
        claims.append(len(jobs))
        return jobs

    site.queue.claim = counted
    for name in ("job-1", "job-2"):
        await site.send(name)
    await engine.until(lambda: len(engine.submitted) == 2)
    assert [count for count in claims if count] == [2]


async def test_a_worker_ahead_of_its_share_still_takes_what_nobody_else_does(site):
    """Its own node has no share: another replica has it, which never claims."""
    other = replace(replica_elsewhere(), state=ReplicaState.READY)
    lease = await site.state.grant_lease(60.0)
    await site.cluster.put_replica(other, lease=lease)
    await put_plan(site, shares={str(MODEL): {str(other.node_id): 1.0}})
    engine = await site.ready()
    for name in ("job-1", "job-2"):
        await site.running(engine, name)


def replica_elsewhere() -> ReplicaRecord:
    place = (WorkerId("elsewhere"), NodeId("node-9"))
    return ReplicaRecord(*place, MODEL, ReplicaState.STARTING, SLOTS, 0, 1, 64, 0.0)


async def test_interactive_jobs_are_claimed_beyond_the_slots_that_batch_jobs_have(site):
    """The engine gives them those slots; no more batch jobs come, nor more than the slots."""
    engine = await site.ready()
    batch = [await site.running(engine, f"b{n}", priority=Priority.BATCH) for n in range(SLOTS)]
    await site.send("b-late", priority=Priority.BATCH)
    chats = [await site.running(engine, f"chat{n}") for n in range(SLOTS)]
    await site.send("chat-late")
    engine.step(run_of(chats[0], 0))
    await site.router.until(lambda: site.router.steps)
    assert (await site.queue.depth(MODEL)).waiting == 2
    engine.step(run_of(chats[0], 1, finish=FINISH))
    await engine.until(lambda: ("chat-late", 1) in engine.submitted)
    assert ("b-late", 1) not in engine.submitted
    engine.step(*(run_of(one, 0, finish=FINISH) for one in (*batch, chats[1])))
    await engine.until(lambda: ("b-late", 1) in engine.submitted)


async def test_idle_and_busy_reach_the_record(site):
    engine = await site.ready()
    a_job = await site.running(engine)
    busy = (await site.until(lambda v: v.replicas[KEY].idle_since_unix_s == 0.0)).replicas[KEY]
    assert busy.running_jobs == 1
    site.now = 1234.0
    engine.step(run_of(a_job, 0, finish=FINISH))
    await site.until(lambda v: v.replicas[KEY].idle_since_unix_s == 1234.0)


async def test_a_busy_replica_does_not_tell_what_the_job_before_had_in_the_cache(site):
    engine = await site.ready()
    first = await site.running(engine)
    await site.until(lambda v: v.replicas[KEY].running_jobs == 1)
    engine.step(run_of(first, 0), kv_blocks=100, kv_used_blocks=80)
    engine.step(run_of(first, 1, finish=FINISH), kv_blocks=100, kv_used_blocks=80)
    await site.until(lambda v: v.replicas[KEY].running_jobs == 0)
    await site.running(engine, "job-2")
    busy = (await site.until(lambda v: v.replicas[KEY].running_jobs == 1)).replicas[KEY]
    assert busy.kv_share == 0.0


async def test_the_record_tells_the_jobs_that_run_how_fast_and_what_moving_one_costs(site):
    engine = await site.ready()
    a_job = await site.running(engine)
    engine.step(run_of(a_job, 0))
    for tokens in (100, 300):
        sample = Sample(tokens, 0.5 + 0.01 * tokens, 0.01 * tokens)
        site.desk._costs.note(MODEL, "elsewhere:1", DataPath.TOKENS, sample)
    site.now = 1111.0
    await site.router.until(lambda: site.router.steps)
    site.host.note_moved(MODEL)
    record = (await site.until(lambda v: v.replicas[KEY].move_fixed_s > 0)).replicas[KEY]
    assert record.jobs == (RunningJob(a_job.job_id, 3, 1, 8),)
    assert (record.seen_unix_s, record.step_s) == (1111.0, 0.001)
    assert (record.move_fixed_s, record.move_s_per_token) == pytest.approx((0.5, 0.01))
    engine.step(run_of(a_job, 1, finish=FINISH))
    await site.until(lambda v: v.replicas[KEY].jobs == ())


async def test_a_dead_engine_is_restarted_at_once_and_its_jobs_are_lost(site):
    engine = await site.ready()
    a_job = await site.running(engine)
    engine.step(run_of(a_job, 0))
    await site.router.until(lambda: site.router.steps)
    engine.kill()
    await site.router.until(lambda: site.router.lost == [("job-1", 1)])
    second = await site.spawner.engine(1)
    await site.until(lambda v: v.replicas[KEY].pid == second.pid)
    site.router.reply_stop(a_job)
    await site.running(second, "job-1", epoch=2, generated=(7,))
    assert site.store.leases[0].is_closed


async def test_failures_are_recorded_and_retried(site):
    site.store.failures = [Unavailable("the disk is away")]
    site.spawner.failures = [CorruptCheckpoint("tensor x is not there")]
    await site.assign()
    await site.replica(ReplicaState.READY)
    assert site.store.loads == [MODEL] * 3
    assert site.store.wanted_unix_s[1:] == [0.0, 0.0]
    assert len(site.spawner.engines) == 2
    assert [lease.is_closed for lease in site.store.leases] == [True, False]
    await site.until(lambda v: v.replicas[KEY].failures == 0)


async def test_a_failed_replica_says_why(site):
    site.store.failures = [Unavailable("the disk is away")] * 50
    await site.assign()
    record = await site.replica(ReplicaState.FAILED)
    assert record.error == "the disk is away"
    await site.until(lambda v: KEY in v.replicas and v.replicas[KEY].failures >= 2)
    await site.unassign()
    await site.until(lambda v: KEY not in v.replicas)


async def test_a_share_of_a_replica_on_several_workers_fails_and_says_why(site):
    group = (WORKER, WorkerId("w-other"))
    shared = AssignmentRecord(WORKER, ModelName(MODEL), 64, "test", site.now, group=group)
    await site.cluster.put_assignment(shared, fence=site.fence)
    record = await site.replica(ReplicaState.FAILED)
    assert record.error.startswith(f"{MODEL} is assigned to workers {WORKER}, w-other together")
    assert "accelerators=1" in record.error


async def test_unassigned_finishes_its_jobs_then_stops_and_closes_the_lease(site):
    engine = await site.ready()
    a_job = await site.running(engine)
    await site.unassign()
    await site.replica(ReplicaState.DRAINING)
    engine.step(run_of(a_job, 0, finish=FINISH))
    await site.until(lambda v: KEY not in v.replicas)
    assert isinstance(engine.sent[-1], StopEngine)
    assert site.store.leases[0].is_closed
    assert site.router.lost == []
    await site.send("job-2")
    assert (await site.queue.depth(MODEL)).waiting == 1


async def test_a_replica_that_is_taken_back_hands_its_batch_jobs_back_at_once(site):
    """Those of people may finish, and the router takes its time about the other."""
    engine = await site.ready()
    batch = await site.running(engine, "batch", priority=Priority.BATCH)
    chat = await site.running(engine, "chat")
    engine.step(run_of(batch, 0), run_of(chat, 0))
    await site.router.until(lambda: site.router.steps)
    await site.unassign()
    await site.router.until(lambda: site.router.lost == [("batch", 1)])
    assert (batch.job_id, 1) in engine.cancelled
    assert not engine.is_gone
    engine.step(run_of(chat, 1, finish=FINISH))
    await site.router.until(lambda: [("chat", 1)] in site.router.steps)
    await site.until(lambda v: KEY not in v.replicas)
    assert site.router.lost == [("batch", 1)]


async def test_a_worker_that_goes_away_does_not_yield_its_batch_jobs_before_it_must(site):
    engine = await site.ready()
    batch = await site.running(engine, "batch", priority=Priority.BATCH)
    draining = asyncio.create_task(site.host.drain(20.0))
    await site.replica(ReplicaState.DRAINING)
    engine.step(run_of(batch, 0, finish=FINISH))
    report = await draining
    assert (report.finished_jobs, report.lost_job_ids, site.router.lost) == (1, (), [])


async def test_assigned_again_while_draining_starts_anew_afterwards(site):
    engine = await site.ready()
    a_job = await site.running(engine)
    await site.unassign()
    await site.replica(ReplicaState.DRAINING)
    await site.assign()
    engine.step(run_of(a_job, 0, finish=FINISH))
    second = await site.spawner.engine(1)
    view = await site.until(lambda v: KEY in v.replicas and v.replicas[KEY].pid == second.pid)
    assert view.replicas[KEY].state is ReplicaState.READY


async def test_drain_hands_back_what_does_not_finish_and_takes_nothing_new(site):
    engine = await site.ready()
    await site.running(engine)
    report = await site.host.drain(0.0)
    assert (report.finished_jobs, report.lost_job_ids) == (0, ("job-1",))
    await site.router.until(lambda: site.router.lost == [("job-1", 1)])
    view = await site.until(lambda v: KEY not in v.replicas)
    assert view.workers[WORKER].max_replicas == 0
    await site.unassign()
    await site.assign()
    await site.until(lambda v: KEY in v.assignments)
    assert site.host.replicas() == ()


async def test_stop_deregisters(site):
    await site.ready()
    await site.host.stop(0.0)
    view = await site.until(lambda v: WORKER not in v.workers)
    assert KEY not in view.replicas


async def test_a_lost_lease_is_replaced_and_everything_is_published_again(site):
    await site.ready()
    site.leases[0].expire()
    await site.until(lambda v: WORKER in v.workers and KEY in v.replicas and len(site.leases) == 2)
    assert site.cluster.view.replicas[KEY].state is ReplicaState.READY
    assert len(site.spawner.engines) == 1


async def test_a_dead_workers_entries_are_taken_over(site):
    other = WorkerId("worker-b")
    lease = await site.state.grant_lease(60.0)
    await site.cluster.put_worker(worker_record(other), lease=lease)
    await site.until(lambda v: other in v.workers)
    await site.send("job-9")
    await site.queue.claim(MODEL, other, max_jobs=1, block_s=0)
    engine = await site.ready()
    await site.running(engine, "job-1")
    assert engine.submitted == [("job-1", 1)]
    await lease.revoke()
    await engine.until(lambda: ("job-9", 1) in engine.submitted)


async def test_entries_of_the_dead_are_taken_over_when_a_replica_becomes_ready(site):
    await site.send("job-9")
    await site.queue.claim(MODEL, "worker-dead", max_jobs=1, block_s=0)
    engine = await site.ready()
    await engine.until(lambda: ("job-9", 1) in engine.submitted)


async def test_a_queue_outage_does_not_stop_the_engine(site):
    engine = await site.ready()
    a_job = await site.running(engine)
    site.queue.server.stop()
    engine.step(run_of(a_job, 0))
    await site.router.until(lambda: site.router.steps)
    site.queue.server.start()
    await site.running(engine, "job-2")


async def test_a_router_unknown_to_the_view_is_still_served(site):
    engine = await site.ready()
    stranger = await FakeRouter(RouterId("router-x")).start(site.stack)
    await site.queue.append(job("job-5", address=stranger.address, router_id="router-x"))
    await engine.until(lambda: ("job-5", 1) in engine.submitted)
