"""A whole worker host: replicas from assignment to end, and what its records tell."""

import asyncio

import pytest

from gearfall.core.errors import CorruptCheckpoint, Unavailable
from gearfall.core.generation.job import Priority
from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.memory import kv_capacity_tokens
from gearfall.core.records import AssignmentRecord, ReplicaState, RunningJob, SchedulerRecord
from gearfall.core.tiers import Tier
from gearfall.infra.state.election import campaign
from services.worker.engine_link.messages import StopEngine
from services.worker.migration.cost import DataPath, Sample
from tests.services.worker.fakes import (
    FINISH,
    MODEL,
    WORKER,
    model_record,
    run_of,
)
from tests.services.worker.worker_site import KEY, SLOTS


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
