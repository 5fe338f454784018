"""Which jobs a whole worker host claims, when, and whose."""

import asyncio
from dataclasses import replace

from gearfall.core.errors import CorruptCheckpoint, Unavailable
from gearfall.core.gears.gear_plan import Gear, GearPlan, PlacedReplicas, Promise, plan_text
from gearfall.core.gears.gear_records import GearPlanRecord
from gearfall.core.generation.job import Priority
from gearfall.core.ids import DeploymentName, NodeId, RouterId, WorkerId
from gearfall.core.ports import QueueDepth
from gearfall.core.records import (
    ReplicaRecord,
    ReplicaState,
    Stage,
)
from gearfall.infra.queue.memory_queue import MemoryQueue
from services.worker.jobs.job_follower import submission
from tests.services.worker.fakes import (
    FINISH,
    MODEL,
    NODE,
    FakeRouter,
    job,
    run_of,
    worker_record,
)
from tests.services.worker.worker_site import KEY, SLOTS


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


async def test_a_job_that_a_broken_claim_was_given_goes_back_though_its_replica_has_left(site):
    """Its entry is the worker's own, and the worker lives on: nobody else would ever take it."""
    await site.ready()
    claim, is_asking = MemoryQueue(site.queue.server).claim, asyncio.Event()

    async def lost(*arguments, **named):
        is_asking.set()
        if await claim(*arguments, **named):
            site.queue.server.stop()
            raise Unavailable("the connection was lost")
        return ()

    site.queue.claim = lost
    await is_asking.wait()
    waiting = await site.send()
    await site.unassign()
    await site.until(lambda view: KEY not in view.replicas)
    assert not site.queue.server.is_up
    site.queue.server.start()
    await site.router.until(lambda: site.router.lost == [(waiting.job_id, waiting.epoch)])
    is_settled, acknowledge = asyncio.Event(), site.queue.acknowledge

    async def noted(*arguments):
        await acknowledge(*arguments)
        is_settled.set()

    site.queue.acknowledge = noted
    site.router.reply_stop(waiting)
    await is_settled.wait()
    assert await site.queue.depth(MODEL) == QueueDepth(waiting=0, claimed=0)
