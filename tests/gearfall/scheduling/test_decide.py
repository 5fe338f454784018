"""What one decision after the other leads to: groups, drains, claims, contention."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName, RouterId
from gearfall.core.origin import source_tier
from gearfall.core.records import LoadRecord
from gearfall.scheduling.actions import Assign, Unassign
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.placement.room_making import EVICTION_S
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
from tests.gearfall.scheduling.deciding_cluster import NOW, POLICY, ROOM, Cluster, busy


def test_the_jobs_of_a_leaving_worker_get_a_place_at_once():
    cluster = Cluster(
        *(node(), model("x"), worker("a"), worker("b")),
        *(assignment("x", "a", memory_bytes=ROOM), busy("x", "a")),
    )
    assert cluster.step() == []
    cluster.put(worker("a", max_replicas=0))
    assert cluster.step() == [("unassign", "a", "x"), ("assign", "b", "x")]


def test_an_idle_replica_of_a_leaving_worker_is_not_replaced():
    idle = replica("x", "a", idle_since=NOW)
    cluster = Cluster(
        *(node(), model("x"), worker("a", max_replicas=0), worker("b")),
        *(assignment("x", "a", memory_bytes=ROOM), idle),
    )
    assert cluster.step() == [("unassign", "a", "x")]


def test_batch_work_takes_free_room_only():
    idle = (assignment("x", "a", memory_bytes=ROOM), replica("x", "a", idle_since=1.0))
    waiting = replace(demand("small", since=0.0), batch_jobs=1)
    cluster = Cluster(
        *(node(), model("x"), model("small"), worker("a", memory_bytes=ROOM)), *idle, waiting
    )
    cluster.now = 1000.0
    cluster.put(deployment("x", keep_alive_s=1e6))
    assert cluster.step() == []
    assert cluster.decision("small").decision == "wait"
    cluster.put(worker("b"))
    assert cluster.step() == [("assign", "b", "small")]


def test_a_group_comes_and_goes_whole():
    pair = [worker(name, memory_bytes=ROOM) for name in ("a", "b")]
    cluster = Cluster(
        *(node(), *pair, model("small", size_bytes=700 * MIB)),
        *(replace(deployment("small"), accelerators=2), demand("small")),
    )
    assert cluster.step() == [("assign", "a", "small"), ("assign", "b", "small")]
    assert {each.group for each in cluster.fleet.records.assignments.values()} == {("a", "b")}
    assert cluster.step() == []
    cluster.fleet.remove("assignments", ("b", "small"))
    assert cluster.step()[0] == ("unassign", "a", "small"), "half a group serves nobody"


def test_room_that_is_being_made_is_made_for_one():
    records = [
        assignment("x", "a", memory_bytes=ROOM),
        replica("x", "a", idle_since=1.0, memory_bytes=ROOM),
        *(model(name, size_bytes=300 * MIB) for name in ("x", "one", "two")),
    ]
    cluster = Cluster(node(), worker("a", memory_bytes=ROOM), *records, demand("one", since=90.0))
    assert cluster.step() == [("unassign", "a", "x")]
    cluster.put(demand("two", since=10.0))
    assert cluster.step() == []
    cluster.gone(replica("x", "a"))
    assert cluster.step() == [("assign", "a", "one")]
    assert "those that room is made for" in dict(cluster.decision("two").rejected)["worker a"]


def test_contention_is_resolved_over_all():
    """`one` has a second place that is nearly as good; `two` has only the first."""
    places = (
        node("n1", on_ssd=["one", "two"], ssd_bytes_per_s=2e9),
        node("n2", on_ssd=["one"], ssd_bytes_per_s=1.9e9, remote_bytes_per_s=1e7),
        worker("a", node_id="n1", max_replicas=1),
        worker("b", node_id="n2", max_replicas=1),
        model("one", nodes=("n1", "n2"), size_bytes=400 * MIB),
        model("two", nodes=("n1",), size_bytes=400 * MIB),
    )
    both = (demand("one", since=NOW - 2.0), demand("two", since=NOW - 1.0))
    assert Cluster(*places, both[0]).step() == [("assign", "a", "one")], "alone"
    together = Cluster(*places, *both).step()
    assert sorted(together) == [("assign", "a", "two"), ("assign", "b", "one")]


def test_who_waited_out_its_patience_goes_before_the_optimum():
    names = ("old", "new")
    cluster = Cluster(
        *(node(), worker(max_replicas=1), *(model(name) for name in names)),
        *(demand("old", since=NOW - 20.0), demand("new", jobs=16, since=NOW - 1.0)),
    )
    assert cluster.step() == [("assign", "worker-a", "old")]
    cluster = Cluster(
        *(node(), worker(max_replicas=1), *(model(name) for name in names)),
        *(demand("old", since=NOW - 19.0), demand("new", jobs=16, since=NOW - 1.0)),
    )
    assert cluster.step() == [("assign", "worker-a", "new")]


def test_a_small_model_is_not_held_up_by_large_ones_that_wait():
    large = [model(f"large{i}", size_bytes=900 * MIB) for i in range(12)]
    filler = (assignment("x", memory_bytes=1000 * MIB), replica("x", memory_bytes=1000 * MIB))
    cluster = Cluster(node(), worker(), model("x"), *large, *filler, model("small"))
    cluster.put(*(demand(each.name, since=NOW - 5.0) for each in large))
    cluster.put(demand("small", since=NOW))
    assert cluster.step() == []
    cluster.put(*(replace(each, memory_bytes=800 * MIB) for each in filler))
    assert cluster.step() == [("assign", "worker-a", "small")]


NODES = ("n0", "n1", "n2")


@given(
    listed=st.sets(st.sampled_from(NODES)),
    live=st.sets(st.sampled_from(NODES), min_size=1),
    resident=st.sets(st.sampled_from(NODES)),
    on_ssd=st.dictionaries(st.sampled_from(NODES), st.booleans()),
    source=st.sampled_from(("/models/small", "s3://bucket/small")),
)
def test_the_index_knows_the_tier_that_the_records_say(listed, live, resident, on_ssd, source):
    record = model(nodes=sorted(listed), source=source)
    nodes = {}
    fleet = Fleet()
    fleet.put("models", record)
    for name in sorted(live):
        held = None if name not in on_ssd else ["small"] * on_ssd[name]
        nodes[name] = node(name, resident=["small"] * (name in resident), on_ssd=held)
        fleet.put("nodes", nodes[name])
    special = fleet.index.nodes_out_of_line(record, nodes)
    for name, there in nodes.items():
        found = source_tier(record, there, nodes)
        assert fleet.source_tier(record, name) is found
        if name not in special:
            reaches = source.startswith("s3") or bool(listed & live)
            assert (found.value if found else None) == ("remote" if reaches else None)


def queued_behind_its_own(*, tokens_left, since=NOW):
    """`small` runs at `a`, all of its one slot taken; more of it waits; `b` is free and cold."""
    running = replace(busy("small", "a", tokens_left=tokens_left), slots=1)
    waiting = replace(demand("small", since=since), output_tokens=50)
    return Cluster(
        *(node("n1"), node("n2"), worker("a", node_id="n1"), worker("b", node_id="n2")),
        *(model("small", nodes=("n1", "n2"), size_bytes=400 * MIB), assignment("small", "a")),
        *(running, waiting, deployment("small", max_replicas=2)),
    )


def test_no_replica_starts_that_would_come_later_than_the_ones_there():
    cluster = queued_behind_its_own(tokens_left=6)
    assert cluster.step() == []
    assert cluster.decision("small").decision == "wait"
    assert "its own replicas" in cluster.decision("small").reason
    assert cluster.plan().next_due_unix_s <= NOW + 0.6 + 2 * EVICTION_S
    assert queued_behind_its_own(tokens_left=600).step() == [("assign", "b", "small")]


def test_a_promise_that_is_not_kept_is_no_longer_believed():
    cluster = queued_behind_its_own(tokens_left=13)  # a start takes 1.4 s here
    assert cluster.step() == []
    cluster.now += 0.5
    cluster.put(replace(demand("small", jobs=2, since=NOW), output_tokens=100))
    assert cluster.step() == [("assign", "b", "small")], "more came meanwhile"


def test_nobody_waits_behind_its_own_for_longer_than_its_patience():
    late = queued_behind_its_own(tokens_left=6, since=NOW - POLICY.patience_s)
    assert late.step() == [("assign", "b", "small")]


def test_room_goes_to_one_whose_bytes_are_near_before_those_who_asked_earlier():
    names = ("small", "y", "z", "near")
    cluster = Cluster(
        *(node("n1", resident=["near"]), worker("a", node_id="n1", memory_bytes=ROOM)),
        *(model("x", nodes=("n1",)), assignment("x", "a", memory_bytes=ROOM), busy("x", "a")),
        *(model(name, nodes=("n1",), size_bytes=400 * MIB) for name in names),
    )
    for number, name in enumerate(names):
        cluster.put(demand(name, since=NOW))
        cluster.now += 0.1 * number
        assert cluster.step() == []
    cluster.gone(assignment("x", "a"), replica("x", "a"))
    assert cluster.step() == [("assign", "a", "near")]


def test_an_end_that_is_late_is_looked_at_less_and_less_often():
    cluster = Cluster(
        *(node("n1"), worker("a", node_id="n1", memory_bytes=ROOM)),
        *(model("x", nodes=("n1",)), assignment("x", "a", memory_bytes=ROOM)),
        *(busy("x", "a", tokens_left=10), model("small", nodes=("n1",), size_bytes=400 * MIB)),
        demand("small", since=NOW),
    )
    looks = []
    while cluster.now < NOW + 8.0:
        plan = cluster.plan()
        assert not any(isinstance(each, Assign | Unassign) for each in plan.actions)
        looks.append(cluster.now - NOW)
        cluster.now = plan.next_due_unix_s
    first = next(each for each in looks if each > 0.5)  # before that its bytes are sent for
    assert first == pytest.approx(1.0, abs=2 * EVICTION_S), "when it should have ended"
    assert len(looks) < 12, f"it did not end and was looked at at {looks}"
    cluster.put(replica("x", "a", idle_since=cluster.now))
    assert ("unassign", "a", "x") in cluster.step(), "what really ended is heard of at once"


def test_a_removed_model_leaves_nothing_behind():
    gone = model("x")
    cluster = Cluster(node(), worker("a"), gone, demand("x"), demand("small"), model("small"))
    for name in ("x", "small"):
        record = LoadRecord(ModelName(name), RouterId("router-a"), NOW, 3, 10, 0, 1)
        cluster.fleet.put("load", record)
    cluster.step()
    assert cluster.fleet.loads.keys() == {"x", "small"}
    cluster.gone(gone)
    assert {"x", "small"} <= cluster.fleet.records.decisions.keys()
    cluster.step()
    assert cluster.fleet.loads.keys() == {"small"}
    assert cluster.fleet.records.decisions.keys() == {"small"}
    assert not cluster.fleet.promises.keys() - {"small"}


def test_a_new_leader_lets_what_was_decided_of_removed_models_go():
    cluster = Cluster(node(), worker("a"), model("x"), demand("x"))
    cluster.step()
    cluster.gone(model("x"), demand("x"))
    cluster.leader_dies()
    assert cluster.decision("x").decision == "start"
    cluster.step()
    assert not cluster.fleet.records.decisions
