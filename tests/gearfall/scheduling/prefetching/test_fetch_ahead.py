"""Bytes come to where a model waits for a place, so that it starts from memory there."""

from dataclasses import replace

import pytest

from gearfall.core.ids import JobId, ModelName, NodeId
from gearfall.core.records import PrefetchRecord, RunningJob
from gearfall.core.tiers import Tier
from gearfall.scheduling.actions import Assign, BeginMove, Decide, Unwish, Wish
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.reconcile import Plan, decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from tests.gearfall.scheduling.clusters import (
    MIB,
    assignment,
    demand,
    deployment,
    model,
    node,
    replica,
    worker,
)

POLICY = SchedulerPolicy(min_residency_s=0.0)
NOW = 100.0
LOAD_S = 2.0
SIZE = 10 * MIB
NODES = ("n1", "n2")
SMALL = ModelName("small")


def busy(name: str, worker_id: str, left_s: float):
    """A replica with a job that ends in so many seconds."""
    ready = replica(name, worker_id, slots=1)
    job = RunningJob(JobId(name), 1, 0, round(100 * left_s))
    return (
        assignment(name, worker_id),
        replace(ready, jobs=(job,), step_s=0.01, seen_unix_s=NOW),
    )


def full(left_s=(1.0, 9.0), *, waiting=("small",), wished=()) -> Fleet:
    """Two nodes with one place each, which a job holds; who waits is on both disks."""
    fleet = Fleet()
    for name in ("small", "other", "x", "y"):
        fleet.put("models", replace(model(name, size_bytes=SIZE), nodes=tuple(map(NodeId, NODES))))
    for name in NODES:
        disk = node(name, on_ssd=["small", "other", "x", "y"], ssd_bytes_per_s=SIZE / LOAD_S)
        fleet.put("nodes", disk)
    for worker_id, node_id, name, seconds in zip("ab", NODES, "xy", left_s, strict=True):
        fleet.put("workers", worker(worker_id, node_id=node_id, max_replicas=1))
        held, running = busy(name, worker_id, seconds)
        fleet.put("assignments", held)
        fleet.put("replicas", replace(running, node_id=NodeId(node_id)))
    for number, name in enumerate(waiting):
        fleet.put("demand", demand(name, since=NOW + 0.001 * number))
    for node_id in wished:
        fleet.put("prefetch", PrefetchRecord(NodeId(node_id), SMALL, Tier.DRAM, "test", NOW))
    return fleet


def step(fleet: Fleet, policy: SchedulerPolicy = POLICY, now: float = NOW + 0.01) -> Plan:
    return decide(fleet, StartCosts(), policy, now)


def fetched(plan: Plan) -> list[tuple[str, str, Tier]]:
    wishes = [each.prefetch for each in plan.actions if isinstance(each, Wish)]
    return [(each.node_id, each.model, each.tier) for each in wishes]


def test_bytes_come_to_the_place_that_is_waited_for():
    assert fetched(step(full())) == [("n1", "small", Tier.DRAM)]


def test_nothing_is_fetched_where_it_was_wished_for_or_is_there_or_nobody_may():
    assert fetched(step(full(wished=["n1"]))) == []
    fleet = full()
    fleet.put("nodes", node("n1", resident=["small"], on_ssd=["small", "x"]))
    assert fetched(step(fleet)) == []
    assert fetched(step(full(), replace(POLICY, prefetch=None))) == []


@pytest.mark.parametrize(("left_s", "is_time"), [(2.5, True), (3.5, False)])
def test_bytes_come_when_they_are_about_to_be_needed(left_s, is_time):
    fleet = full((left_s, 19.0))
    plan = step(fleet)
    assert bool(fetched(plan)) is is_time
    if not is_time:
        assert plan.next_due_unix_s == pytest.approx(NOW + 0.6, abs=0.1), "looked at in time"
        assert fetched(step(fleet, now=NOW + 0.7)) == [("n1", "small", Tier.DRAM)]


def test_who_is_not_next_moves_nothing():
    fleet = full(waiting=["small"])
    fleet.refresh(POLICY, NOW)
    step(fleet)
    fleet.put("demand", demand("other", since=NOW + 0.02))
    assert ("n1", "other", Tier.DRAM) not in fetched(step(fleet, now=NOW + 0.02))


def test_a_start_takes_back_what_was_to_come_to_other_nodes():
    fleet = full(wished=["n1", "n2"])
    held, _ = busy("y", "b", 0.0)
    fleet.remove("assignments", (held.worker_id, held.model))
    fleet.remove("replicas", (held.worker_id, held.model))
    plan = step(fleet)
    assert [a.assignment.worker_id for a in plan.actions if isinstance(a, Assign)] == ["b"]
    assert [a.key for a in plan.actions if isinstance(a, Unwish)] == [("n1", "small")]
    fleet.check()


def test_what_waits_keeps_its_wish_when_wishes_are_looked_at():
    fleet = full((9.0, 19.0), wished=["n1"])
    fleet.prefetch_due_unix_s = 0.0
    plan = step(fleet)
    assert not [a for a in plan.actions if isinstance(a, Unwish)]


def with_a_third(fleet: Fleet, load_s: float = LOAD_S) -> None:
    """Another node comes with a worker, which has the bytes of who waits on disk."""
    nodes = tuple(map(NodeId, (*NODES, "n3")))
    fleet.put("models", replace(model("small", size_bytes=SIZE), nodes=nodes))
    fleet.put("nodes", node("n3", on_ssd=["small"], ssd_bytes_per_s=SIZE / load_s))
    fleet.put("workers", worker("c", node_id="n3", max_replicas=1))


def put_wishes(fleet: Fleet, plan: Plan) -> None:
    for action in plan.actions:
        if isinstance(action, Wish):
            fleet.put("prefetch", action.prefetch)


def test_bytes_still_come_for_one_replica_when_another_has_its_place():
    fleet = full((2.5, 19.0))
    fleet.put("deployments", deployment("small", min_replicas=2, max_replicas=2))
    fleet.put("demand", demand("small", jobs=50, since=NOW))
    put_wishes(fleet, step(fleet))
    with_a_third(fleet)
    plan = step(fleet, now=NOW + 0.5)
    assert [a.assignment.worker_id for a in plan.actions if isinstance(a, Assign)] == ["c"]
    assert not [a for a in plan.actions if isinstance(a, Wish | Unwish)]
    fleet.check()


@pytest.mark.parametrize("left_s", [None, 30.0])
def test_a_worker_that_is_no_better_leaves_who_waits_in_its_line(left_s):
    fleet = full((2.5, 19.0))
    put_wishes(fleet, step(fleet))
    held, running = busy("z", "c", left_s or 0.0)
    fleet.put("models", replace(model("z", size_bytes=SIZE), nodes=(NodeId("n3"),)))
    fleet.put("nodes", node("n3", on_ssd=["z"], remote_bytes_per_s=SIZE / LOAD_S))
    fleet.put("workers", worker("c", node_id="n3", max_replicas=1))
    fleet.put("assignments", held)
    running = running if left_s else replica("z", "c", slots=1)
    fleet.put("replicas", replace(running, node_id=NodeId("n3")))
    put_wishes(fleet, step(fleet, now=NOW + 0.1))
    assert fleet.lines.place_of(SMALL) == "a"
    fleet.put("demand", demand("other", since=NOW + 0.2))
    assert fetched(step(fleet, now=NOW + 0.2)) == []


def moving() -> Fleet:
    """One place, which somebody leaves who has to start elsewhere first: it takes eight seconds."""
    fleet = Fleet()
    there = (NodeId("n1"), NodeId("n2"))
    fleet.put("models", replace(model("small", size_bytes=SIZE), nodes=there[:1]))
    fleet.put("models", replace(model("x", size_bytes=8 * SIZE), nodes=there))
    fleet.put("nodes", node("n1", on_ssd=["small", "x"], ssd_bytes_per_s=SIZE / LOAD_S))
    fleet.put("nodes", node("n2", on_ssd=["x"], ssd_bytes_per_s=SIZE, remote_bytes_per_s=1e5))
    for worker_id, node_id in zip("ab", there, strict=True):
        fleet.put("workers", worker(worker_id, node_id=node_id, max_replicas=1))
    held, running = busy("x", "a", 60.0)
    fleet.put("assignments", held)
    fleet.put("replicas", replace(running, node_id=there[0]))
    fleet.put("demand", demand("small", since=NOW))
    return fleet


def test_bytes_come_at_once_to_the_place_that_a_move_makes():
    plan = step(moving())
    assert [each for each in plan.actions if isinstance(each, BeginMove)]
    assert fetched(plan) == [("n1", "small", Tier.DRAM)]


@pytest.mark.parametrize(("load_s", "is_better"), [(10.3, False), (5.0, True)])
def test_a_move_is_left_for_what_starts_sooner_than_behind_it_with_the_bytes_there(
    load_s, is_better
):
    fleet = moving()
    plan = step(fleet)
    put_wishes(fleet, plan)
    for action in plan.actions:
        if isinstance(action, BeginMove):
            fleet.put("moves", action.move)
        elif isinstance(action, Assign):
            fleet.put("assignments", action.assignment)
    step(fleet, now=NOW + 0.1)
    with_a_third(fleet, load_s)
    plan = step(fleet, now=NOW + 0.2)
    assert ["c"] * is_better == [
        each.assignment.worker_id for each in plan.actions if isinstance(each, Assign)
    ]


@pytest.mark.parametrize("is_fulfilled", [False, True])
def test_bytes_come_from_the_disk_that_they_were_only_wished_to(is_fulfilled):
    fleet = full()
    names = ["small", "x"] if is_fulfilled else ["x"]
    fleet.put("nodes", node("n1", on_ssd=names, remote_bytes_per_s=SIZE, ssd_bytes_per_s=SIZE))
    fleet.put("prefetch", PrefetchRecord(NodeId("n1"), SMALL, Tier.SSD, "test", NOW))
    fleet.prefetch_due_unix_s = 0.0
    plan = step(fleet)
    assert fetched(plan) == [("n1", "small", Tier.DRAM)]
    assert not [each for each in plan.actions if isinstance(each, Unwish)]
    fleet.check()


@pytest.mark.parametrize("left_s", [3.5, 3.87, 4.24, 4.61, 4.98])
def test_a_look_exactly_when_it_was_due_has_the_bytes_brought(left_s):
    fleet = full((left_s, 19.0))
    due_unix_s = step(fleet).next_due_unix_s
    assert due_unix_s is not None
    assert fetched(step(fleet, now=due_unix_s)) == [("n1", "small", Tier.DRAM)]


def test_what_is_hinted_at_comes_no_sooner_to_a_place_that_it_waits_for():
    fleet = full((3.5, 19.0))
    fleet.put("demand", replace(demand("small", since=NOW), hinted_jobs=1))
    assert fetched(step(fleet)) == []


@pytest.mark.parametrize(("wished", "taken"), [((), "a"), (("n1",), "a"), (("n2",), "b")])
def test_of_equal_places_the_one_is_taken_that_the_bytes_are_on_their_way_to(wished, taken):
    fleet = full(wished=wished)
    for name, worker_id in zip("xy", "ab", strict=True):
        held, _ = busy(name, worker_id, 0.0)
        fleet.remove("assignments", (held.worker_id, held.model))
        fleet.remove("replicas", (held.worker_id, held.model))
    plan = step(fleet)
    assert [a.assignment.worker_id for a in plan.actions if isinstance(a, Assign)] == [taken]
    assert not [a for a in plan.actions if isinstance(a, Unwish)]


def test_what_was_not_taken_says_that_the_bytes_come_meanwhile():
    (decided,) = (a.decision for a in step(full((2.5, 1.0))).actions if isinstance(a, Decide))
    (worker_id, why_not), *_ = decided.rejected
    assert (decided.worker_id, worker_id) == ("b", "worker a")
    assert (
        "room in 2.59 s and its bytes meanwhile, ready in 3.59 s; without a wait 3.00 s" in why_not
    )
