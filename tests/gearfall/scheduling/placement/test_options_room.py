"""Places that have to be made: who leaves, who moves, and who is waited for."""

from dataclasses import replace

import pytest

from gearfall.core.generation.job import Priority
from gearfall.core.ids import NodeId, WorkerId
from gearfall.scheduling.fleet.wants import Urgency
from gearfall.scheduling.placement.options import assess, with_nearer
from gearfall.scheduling.placement.placement_reasons import why_not
from gearfall.scheduling.placement.room_making import EVICTION_S, Way
from gearfall.scheduling.scene import PUSH_OUT_WEIGHT
from tests.gearfall.scheduling.clusters import (
    MIB,
    demand,
    deployment,
    node,
    worker,
)
from tests.gearfall.scheduling.placement_world import BIG, NOW, World, busy, full_of, hosts, where


def test_the_least_recently_used_makes_room():
    world = full_of(*hosts("new", "a", idle_since=50.0), *hosts("old", "a", idle_since=10.0))
    [option] = world.options()
    assert option.way is Way.EVICT
    assert [victim.key[1] for victim in option.victims] == ["old"]
    assert "gives back old on worker a first" in why_not(option)[1]


def test_no_more_go_than_must():
    small, large = (
        hosts("small-one", "a", idle_since=1.0, size=MIB),
        hosts("x", "a", idle_since=2.0),
    )
    world = World(node(), worker("a", memory_bytes=BIG + MIB), *small, *large)
    [option] = world.options()
    assert [victim.key[1] for victim in option.victims] == ["x"]


def test_minimum_residency_is_kept():
    """Who has to stay yet is waited for until then; nothing is taken back before."""
    young = hosts("young", "a", at=NOW - 1.0, idle_since=NOW - 0.5)
    world = full_of(*young)
    [option] = world.options()
    assert (option.way, option.ending, option.victims) == (Way.AWAIT, ("young",), ())
    assert option.wait_s == pytest.approx(1.0 + EVICTION_S)
    assert world.options(since=NOW - 1e6)[0].way is Way.AWAIT, "however long the other has waited"
    assert world.fleet.worker_due.earliest() == NOW + 1.0


def test_waits_for_a_replica_that_is_leaving_already():
    registered, _, leaving = hosts("old", "a", idle_since=10.0)
    world = full_of(registered, leaving, *hosts("new", "a", idle_since=1.0)[:2])
    world.fleet.put("replicas", hosts("new", "a", idle_since=1.0)[2])
    world.fleet.put("workers", worker("a", memory_bytes=2 * BIG))
    [option] = world.options()
    assert option.way is Way.AWAIT
    assert "room is being made on worker a" in why_not(option)[1]


def test_keeping_a_replica_warm_takes_no_room():
    idle = hosts("idle", "a", idle_since=10.0)
    assert full_of(*idle).options(Urgency.KEEP) == []
    assert full_of(*idle).options(Urgency.BATCH) == []
    assert [each.way for each in full_of(*idle).options(Urgency.EVACUATE)] == [Way.EVICT]


@pytest.mark.parametrize(
    ("idle_since", "at", "remote_bytes_per_s", "expected"),
    [
        (50.0, 0.0, 0.0, (Way.EVICT, "a")),
        (0.0, 0.0, 0.0, (Way.FREE, "b")),  # it runs jobs, nobody says which
        (99.0, 99.0, 0.0, (Way.AWAIT, "a")),  # it may not leave yet, and bytes come meanwhile
        (50.0, 0.0, 1e10, (Way.FREE, "b")),  # fetching is faster than reading here
    ],
)
def test_an_idle_replica_leaves_where_the_model_is_rather_than_it_is_fetched(
    idle_since, at, remote_bytes_per_s, expected
):
    world = World(
        node("n1", on_ssd=["small", "x"]),
        node("n2", on_ssd=[], remote_bytes_per_s=remote_bytes_per_s),
        *(worker("a", node_id="n1", memory_bytes=BIG), worker("b", node_id="n2")),
        *hosts("x", "a", at=at, idle_since=idle_since),
        nodes=("n1",),
        size_bytes=300 * MIB,
    )
    world.fleet.put("workers", worker("b", node_id="n2", memory_bytes=BIG))
    best = world.options()[0]
    assert (best.way, *best.workers) == expected


def near_and_far(*on_near, far=(), **wanted):
    """`a` has the bytes and is full; `b` would have to fetch 400 MiB at 40 MB/s."""
    return World(
        node("n1", on_ssd=["small"]),
        node("n2", on_ssd=[], remote_bytes_per_s=4e7),
        worker("a", node_id="n1", memory_bytes=BIG),
        worker("b", node_id="n2", memory_bytes=2 * BIG),
        *on_near,
        *far,
        nodes=("n1",),
        size_bytes=400 * MIB,
        **wanted,
    )


def test_running_jobs_move_where_that_is_soonest():
    best, other = near_and_far(*busy("x", "a", 10_000)).options()
    assert (best.way, *best.workers) == (Way.MOVE, "a")
    [transfer] = best.transfers
    assert (transfer.key, transfer.target) == (("a", "x"), "b")
    assert transfer.start is not None
    assert best.score < other.score
    assert other.way is Way.FREE
    assert "moves x to worker b on worker a first" in why_not(best)[1]


def test_jobs_move_to_where_their_model_is_ready():
    ready = hosts("x", "b", idle_since=50.0)
    best = near_and_far(*busy("x", "a", 10_000), far=ready).options()[0]
    [transfer] = best.transfers
    assert (transfer.target, transfer.start) == ("b", None)


def test_jobs_that_end_soon_are_waited_for():
    best = near_and_far(*busy("x", "a", 4)).options()[0]
    assert best.way is Way.AWAIT
    assert best.ending == ("x",)
    assert best.wait_s == pytest.approx(0.4 + EVICTION_S)
    assert "waits until x has ended on worker a" in why_not(best)[1]


def test_a_busy_one_goes_when_the_other_waited_out_its_patience():
    world = full_of(*busy("x", "a", 10_000))
    assert world.options(since=NOW - 19.0) == []
    [option] = world.options(since=NOW - 20.0)
    assert (option.way, [each.key[1] for each in option.victims]) == (Way.EVICT, ["x"])


def test_min_replicas_move_but_do_not_go():
    kept = (*busy("x", "a", 10_000), deployment("x", min_replicas=1, max_replicas=2))
    assert full_of(*kept).options(since=NOW - 20.0) == []
    assert near_and_far(*kept).options()[0].way is Way.MOVE


def test_batch_work_goes_first_and_at_once():
    young = busy("x", "a", 10_000, at=NOW - 0.1, priority=Priority.BATCH)
    [option] = full_of(*young).options()
    assert (option.way, [each.key[1] for each in option.victims]) == (Way.EVICT, ["x"])
    pair = (*hosts("idle", "a", idle_since=1.0), *young)
    [option] = full_of(*pair).options()
    assert [each.key[1] for each in option.victims] == ["x"]


def test_a_replica_that_comes_up_for_batch_work_gives_way():
    registered, assigned, _ = hosts("x", "a")
    waiting = replace(demand("x", jobs=2), batch_jobs=2)
    world = full_of(registered, assigned, waiting)
    world.fleet.put("workers", worker("a", memory_bytes=BIG))
    assert world.options()[0].way is Way.EVICT
    world.fleet.put("demand", demand("x", jobs=2))
    assert world.options() == []


def memory_and_disk(*on_near, dram_used_bytes=0):
    """`a` has the bytes in memory and is full; `b` is free and would read them for 4 s."""
    far = replace(node("n2", ssd_bytes_per_s=1e8), dram_used_bytes=dram_used_bytes)
    return World(
        *(node("n1", resident=["small"]), far),
        worker("a", node_id="n1", memory_bytes=BIG),
        worker("b", node_id="n2", memory_bytes=BIG),
        *on_near,
        nodes=("n1", "n2"),
        size_bytes=400 * MIB,
    )


def test_of_a_few_workers_that_are_looked_at_none_beats_waiting_where_the_bytes_are():
    world = memory_and_disk(*busy("x", "a", 10))
    want = world.want()
    far = assess(world.scene, want, (WorkerId("b"),))
    assert far is not None
    found = with_nearer(world.scene, want, [far])
    assert where(found) == [(Way.AWAIT, "a"), (Way.FREE, "b")]
    assert found[0].wait_s == pytest.approx(1.0 + EVICTION_S)
    assert with_nearer(world.scene, replace(want, node_id=NodeId("n2")), [far]) == [far]
    late = memory_and_disk(*busy("x", "a", 10_000))
    assert where(with_nearer(late.scene, late.want(), [far])) == [(Way.FREE, "b")]


def test_a_load_costs_whoever_leaves_memory_for_it():
    room, full = memory_and_disk(), memory_and_disk(dram_used_bytes=node().dram_capacity_bytes)
    free, pushes = (each.options() for each in (room, full))
    costs = [{o.workers[0]: o.cost_s for o in found} for found in (free, pushes)]
    assert costs[0] == {"a": 0.0, "b": 0.0}
    assert costs[1]["a"] == 0.0
    assert costs[1]["b"] == pytest.approx(PUSH_OUT_WEIGHT * 400 * MIB / 1e8)
