"""The typed view of the cluster, followed and written through cluster state."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import Conflict, Internal, Unavailable
from gearfall.core.ids import DeploymentName, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.ports import Fence, KeyDeleted, KeyPut, Snapshot, StateEntry
from gearfall.core.records import (
    AssignmentRecord,
    DecisionRecord,
    DemandRecord,
    DeploymentRecord,
    ModelRecord,
    NodeRecord,
    ReplicaRecord,
    ReplicaState,
    RouterRecord,
    SchedulerRecord,
    Stage,
    WorkerRecord,
)
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_keys import ALL_KINDS, encode_record, key_of
from gearfall.infra.state.cluster_view import ClusterView, ViewBuilder
from gearfall.infra.state.memory_state import MemoryState, MemoryStateServer

TINY = ModelRecord(
    name=ModelName("tiny"),
    digest="0" * 32,
    architecture="LlamaForCausalLM",
    parameters=20_000,
    size_bytes=40_000,
    context_tokens=64,
    vocabulary_size=17,
    bos_token_id=None,
    eos_token_ids=(1,),
    source="/models/tiny",
    nodes=(NodeId("n"),),
    dtype="bfloat16",
)
DEPLOYMENT = DeploymentRecord(DeploymentName("d"), (Stage(TINY.name),))
NODE = NodeRecord(NodeId("n"), "127.0.0.1:1", "/run/attach", 100, 0, 0.0)
WORKER = WorkerRecord(WorkerId("w"), NodeId("n"), "127.0.0.1:2", "cpu", 100, 2)
ROUTER = RouterRecord(RouterId("r"), "127.0.0.1:3", "127.0.0.1:4")
SCHEDULER = SchedulerRecord("s", "127.0.0.1:5")
ASSIGNMENT = AssignmentRecord(WorkerId("w"), TINY.name, 50, "demand", 1.0)
REPLICA = ReplicaRecord(
    WorkerId("w"), NodeId("n"), TINY.name, ReplicaState.READY, 4, 0, 99, 50, 1.0
)
DEMAND = DemandRecord(TINY.name, RouterId("r"), 3, 1.0)
DECISION = DecisionRecord(TINY.name, 1.0, "start", "it waits")


@contextlib.asynccontextmanager
async def following(state: MemoryState) -> AsyncIterator[Cluster]:
    cluster = Cluster(state)
    await cluster.start()
    try:
        yield cluster
    finally:
        await cluster.stop()


async def test_every_kind_is_written_seen_and_deleted():
    server = MemoryStateServer()
    state = MemoryState(server)
    lease = await state.grant_lease(10)
    fence = Fence("leader", await state.put("leader", encode_record(SCHEDULER), lease=lease))
    async with following(MemoryState(server)) as cluster, following(state) as writer:
        await writer.put_model(TINY)
        await writer.put_deployment(DEPLOYMENT)
        await writer.put_node(NODE, lease=lease)
        await writer.put_worker(WORKER, lease=lease)
        await writer.put_router(ROUTER, lease=lease)
        await writer.put_scheduler(SCHEDULER, lease=lease)
        await writer.put_assignment(ASSIGNMENT, fence=fence)
        await writer.put_replica(REPLICA, lease=lease)
        await writer.put_demand(DEMAND, lease=lease)
        revision = await writer.put_decision(DECISION, fence=fence)
        await cluster.wait_seen(revision)
        assert cluster.view == ClusterView(
            models={TINY.name: TINY},
            deployments={DEPLOYMENT.name: DEPLOYMENT},
            nodes={NODE.node_id: NODE},
            workers={WORKER.worker_id: WORKER},
            routers={ROUTER.router_id: ROUTER},
            schedulers={SCHEDULER.scheduler_id: SCHEDULER},
            assignments={(WORKER.worker_id, TINY.name): ASSIGNMENT},
            replicas={(WORKER.worker_id, TINY.name): REPLICA},
            demand={(TINY.name, ROUTER.router_id): DEMAND},
            decisions={TINY.name: DECISION},
            leader=SCHEDULER,
            revision=revision,
        )
        assert await writer.delete_model(TINY.name)
        assert await writer.delete_deployment(DEPLOYMENT.name)
        assert await writer.delete_assignment(WORKER.worker_id, TINY.name, fence=fence)
        assert await writer.delete_replica(WORKER.worker_id, TINY.name)
        assert await writer.delete_demand(TINY.name, ROUTER.router_id)
        assert await state.delete(key_of("decisions", TINY.name), fence=fence)
        assert not await writer.delete_model(TINY.name)
        await lease.revoke()
        last = ClusterView(revision=server.revision)
        await cluster.wait_until(lambda view: view == last)


async def test_a_view_that_was_taken_does_not_change():
    state = MemoryState()
    async with following(state) as cluster:
        await cluster.wait_seen(await cluster.put_model(TINY))
        taken = cluster.view
        await cluster.wait_seen(await cluster.put_model(replace(TINY, parameters=1)))
        assert taken.models[TINY.name] == TINY
        assert cluster.view.models[TINY.name].parameters == 1


async def test_a_deposed_leader_can_not_write():
    state = MemoryState()
    fence = Fence("leader", await state.put("leader", encode_record(SCHEDULER)))
    async with following(state) as cluster:
        await cluster.put_assignment(ASSIGNMENT, fence=fence)
        await state.delete("leader")
        await state.put("leader", encode_record(SCHEDULER))
        for write in (
            cluster.put_assignment(ASSIGNMENT, fence=fence),
            cluster.delete_assignment(WORKER.worker_id, TINY.name, fence=fence),
            cluster.put_decision(DECISION, fence=fence),
        ):
            with pytest.raises(Conflict):
                await write


async def test_changes_name_the_kinds_and_merge_what_was_not_taken():
    state = MemoryState()
    async with following(state) as cluster:
        changes = cluster.changes()
        assert await anext(changes) == ALL_KINDS
        waiting = asyncio.ensure_future(anext(changes))
        await cluster.put_model(TINY)
        assert await asyncio.wait_for(waiting, 10) == {"models"}
        await cluster.put_model(TINY)
        await cluster.put_deployment(DEPLOYMENT)
        await cluster.wait_seen(await state.put("leader", encode_record(SCHEDULER)))
        assert await anext(changes) == {"models", "deployments", "leader"}
        await changes.aclose()


async def test_changes_end_when_the_cluster_stops():
    async with following(MemoryState()) as cluster:

        async def count() -> int:
            return sum([1 async for _ in cluster.changes()])

        counting = asyncio.create_task(count())
        await cluster.wait_seen(await cluster.put_model(TINY))
        await cluster.stop()
        assert await asyncio.wait_for(counting, 10) >= 1
        await cluster.stop()


async def test_a_corrupt_record_is_logged_once_left_out_and_breaks_nothing(caplog):
    server = MemoryStateServer()
    state = MemoryState(server)
    await state.put("models/tiny", encode_record(TINY))
    async with following(state) as cluster:
        await cluster.wait_seen(await state.put("models/tiny", b"\xff{"))
        assert cluster.view.models == {}
        await cluster.wait_seen(await state.put("unknown/thing", b"x"))
        revision = await cluster.put_deployment(DEPLOYMENT)
        server.compact()
        await cluster.wait_seen(revision)
        assert list(cluster.view.deployments) == ["d"]
        await cluster.wait_seen(await cluster.put_model(TINY))
        assert cluster.view.models == {"tiny": TINY}
    messages = [record.key for record in caplog.records if "decode" in record.message]
    assert messages == ["models/tiny", "unknown/thing"]


async def test_start_gives_up_when_cluster_state_can_not_be_reached():
    server = MemoryStateServer()
    server.stop()
    with pytest.raises(Unavailable):
        await Cluster(MemoryState(server)).start(timeout_s=0.05)


async def test_a_view_that_no_longer_follows_says_so():
    is_broken = asyncio.Event()

    class Breaking(MemoryState):
        async def watch(self, prefix: str) -> AsyncGenerator[Any]:
            yield Snapshot((), 5)
            await is_broken.wait()
            raise RuntimeError("a defect")

    cluster = Cluster(Breaking())
    await cluster.start()
    changes = cluster.changes()
    await anext(changes)
    is_broken.set()
    with pytest.raises(Internal, match="a defect"):
        await asyncio.wait_for(anext(changes), 10)
    with pytest.raises(Internal):
        await anext(cluster.changes())
    with pytest.raises(Internal):
        await cluster.wait_seen(6)
    await cluster.stop()


async def test_a_loss_of_memory_is_told_from_a_new_listing():
    server = MemoryStateServer()
    state = MemoryState(server)
    await state.put("incarnation", b"first life")
    async with following(state) as cluster:
        await cluster.wait_seen(await cluster.put_model(TINY))
        server.compact()
        await cluster.wait_seen(await cluster.put_model(TINY))
        assert cluster.view.losses == 0
        server.wipe()
        await cluster.wait_until(lambda view: view.losses == 1)
        assert cluster.view.models == {}
        await cluster.wait_seen(server.put("incarnation", b"second life", 0))
        # The next life has come further than the last one when it is seen.
        server.stop()
        server.wipe()
        server.revision = 1000
        server.put("incarnation", b"third life", 0)
        server.compact()
        server.start()
        await cluster.wait_until(lambda view: view.revision == 1001)
        assert cluster.view.losses == 2


@pytest.mark.parametrize("others", [0, 20], ids=["behind", "beyond"])
async def test_a_write_right_after_a_loss_is_not_taken_for_seen(others: int):
    """`others`: writes that bring the new life beyond what was seen before the watch looks."""
    server = MemoryStateServer()
    async with following(MemoryState(server)) as cluster:
        for _ in range(8):
            revision = await cluster.put_deployment(DEPLOYMENT)
        await cluster.wait_seen(revision)
        server.wipe()
        revision = await cluster.put_model(TINY)
        assert revision < cluster.revision
        for number in range(others):
            server.put(f"other/{number}", b"", 0)
        await cluster.wait_seen(revision)
        assert cluster.view.models == {TINY.name: TINY}
        assert (cluster.view.deployments, cluster.view.losses) == ({}, 1)


async def test_writes_while_it_is_listed_anew_do_not_begin_the_listing_again():
    server = MemoryStateServer()
    async with following(MemoryState(server)) as cluster:
        for _ in range(8):
            revision = await cluster.put_deployment(DEPLOYMENT)
        await cluster.wait_seen(revision)
        server.wipe()
        await cluster.put_model(TINY)
        listing = cluster._task
        revision = await cluster.put_model(TINY)
        assert cluster._task is listing
        await cluster.wait_seen(revision)
        assert cluster.view.losses == 1


async def test_who_catches_up_has_seen_what_others_wrote_even_after_a_loss():
    server = MemoryStateServer()
    async with following(MemoryState(server)) as cluster:
        for _ in range(8):
            server.put("models/tiny", encode_record(TINY), 0)
        await cluster.catch_up(SCHEDULER, lease=await cluster.grant_lease(10))
        assert cluster.view.models == {TINY.name: TINY}
        server.wipe()
        server.put("nodes/n", encode_record(NODE), 0)
        await cluster.catch_up(SCHEDULER, lease=await cluster.grant_lease(10))
        assert (cluster.view.models, cluster.view.nodes) == ({}, {NODE.node_id: NODE})
        assert cluster.view.losses == 1


async def test_who_catches_up_waits_for_no_write_of_a_stranger():
    server = MemoryStateServer()
    async with following(MemoryState(server)) as cluster:
        lease = await cluster.grant_lease(10)
        server.revision += 1  # below a prefix that is not watched
        await cluster.catch_up(SCHEDULER, lease=lease)
        assert cluster.view.schedulers == {SCHEDULER.scheduler_id: SCHEDULER}


async def test_what_lasts_is_kept_over_a_loss_until_it_is_written_again():
    server = MemoryStateServer()
    cluster = Cluster(MemoryState(server), lasting={"models", "deployments"})
    await cluster.start()
    lease = await cluster.grant_lease(10)
    await cluster.put_model(TINY)
    await cluster.put_deployment(DEPLOYMENT)
    await cluster.wait_seen(await cluster.put_node(NODE, lease=lease))
    server.wipe()
    await cluster.wait_until(lambda view: view.losses == 1)
    assert (cluster.view.models, cluster.view.deployments) == (
        {TINY.name: TINY},
        {DEPLOYMENT.name: DEPLOYMENT},
    )
    assert cluster.view.nodes == {}
    await cluster.write_back({"deployments"})
    await cluster.write_back({"deployments"})
    assert list(server.entries) == [f"deployments/{DEPLOYMENT.name}"]
    await cluster.wait_until(lambda view: view.revision == server.revision)
    server.compact()
    await cluster.wait_seen(await cluster.put_node(NODE, lease=await cluster.grant_lease(10)))
    assert cluster.view.models == {TINY.name: TINY}
    assert await cluster.delete_model(TINY.name) == 0
    assert cluster.view.models == {}
    cluster._builder.check()
    await cluster.stop()


KEYS = ["models/tiny", "demand/tiny/r", "leader", "what/ever"]
VALUES = [encode_record(record) for record in (TINY, DEMAND, SCHEDULER)] + [b"?"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.sampled_from(KEYS), st.sampled_from(VALUES)),
            st.tuples(st.just("delete"), st.sampled_from(KEYS), st.just(b"")),
            st.tuples(st.just("restart"), st.just(""), st.just(b"")),
        ),
        max_size=30,
    )
)
def test_following_changes_equals_starting_from_the_result(steps):
    builder, held = ViewBuilder(lasting={"models"}), dict[str, StateEntry]()
    builder.apply(Snapshot((), 1))
    for revision, (step, key, value) in enumerate(steps, start=2):
        if step == "put":
            held[key] = StateEntry(key, value, revision, revision)
            builder.apply(KeyPut(held[key]))
        elif step == "delete":
            held.pop(key, None)
            builder.apply(KeyDeleted(key, revision))
        else:
            builder.apply(Snapshot(tuple(held.values()), revision))
        builder.check()
        fresh = ViewBuilder()
        fresh.apply(Snapshot(tuple(held.values()), revision))
        assert builder.view == fresh.view
