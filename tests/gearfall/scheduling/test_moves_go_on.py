"""A move goes on under whichever leader, and is given up when it makes no sense any more."""

from dataclasses import replace

import pytest

from gearfall.core.ids import WorkerId
from gearfall.core.records import ReplicaState
from gearfall.scheduling.actions import BeginMove, Decide
from gearfall.scheduling.placement.moves import MOST_S
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
from tests.gearfall.scheduling.deciding_cluster import NOW, ROOM, Cluster, busy


def a_move():
    """`small` waits; its bytes are at `a`, where `x` runs; `b` is free and far from the bytes."""
    return Cluster(
        node("n1", on_ssd=["small"]),
        node("n2", on_ssd=[], resident=["x"], remote_bytes_per_s=4e7),
        worker("a", node_id="n1", memory_bytes=ROOM),
        worker("b", node_id="n2", memory_bytes=2 * ROOM),
        model("small", nodes=("n1",), size_bytes=400 * MIB),
        model("x", nodes=("n1", "n2")),
        assignment("x", "a", memory_bytes=ROOM),
        busy("x", "a"),
        demand("small", since=NOW),
    )


STEPS = [
    [("move", "a", "x", "b"), ("assign", "b", "x")],
    [],
    [("unassign", "a", "x")],
    [],
    [("end move", "a", "x"), ("assign", "a", "small")],
    [],
]


@pytest.mark.parametrize("deaths", [(), *((each,) for each in range(6)), tuple(range(6))])
def test_a_move_goes_on_under_whichever_leader(deaths):
    cluster = a_move()
    heard = {
        1: lambda: cluster.put(replica("x", "b", state=ReplicaState.LOADING)),
        2: lambda: cluster.put(replica("x", "b", idle_since=NOW)),
        3: lambda: cluster.put(replace(busy("x", "a"), state=ReplicaState.DRAINING)),
        4: lambda: cluster.gone(busy("x", "a")),
    }
    for number, expected in enumerate(STEPS):
        heard.get(number, lambda: None)()
        if number in deaths:
            cluster.leader_dies()
        assert cluster.step() == expected
        assert cluster.step() == [], "and then rests"
    assert not cluster.fleet.records.moves


def test_a_move_whose_second_write_was_lost_is_finished():
    cluster = a_move()
    begin = next(each for each in cluster.plan().actions if isinstance(each, BeginMove))
    cluster.fleet.put("moves", begin.move)
    cluster.leader_dies()
    assert cluster.step() == [("assign", "b", "x")]


@pytest.mark.parametrize(
    ("blow", "ends"),
    [
        (lambda c: c.gone(worker("b")), True),
        (lambda c: c.gone(demand("small")), True),
        (lambda c: c.put(replica("x", "b", state=ReplicaState.FAILED, failures=2)), True),
        (lambda c: c.fleet.set_unreachable([WorkerId("b")]), True),
        (lambda c: c.put(replica("x", "b", state=ReplicaState.STARTING)), False),
    ],
)
def test_a_move_that_makes_no_sense_any_more_is_given_up(blow, ends):
    cluster = a_move()
    cluster.step()
    blow(cluster)
    assert (("end move", "a", "x") in cluster.step()) == ends
    assert ("a", "x") in cluster.fleet.records.assignments, "what runs there runs on"


def test_a_move_that_takes_too_long_is_given_up():
    cluster = a_move()
    cluster.step()
    cluster.now = NOW + MOST_S
    assert ("end move", "a", "x") in cluster.step()


def test_neither_end_of_a_move_is_too_much_or_missing():
    cluster = a_move()
    cluster.put(deployment("x", min_replicas=1, max_replicas=1, keep_alive_s=0.0))
    assert cluster.step() == STEPS[0]
    cluster.put(replica("x", "b", idle_since=1.0))
    assert cluster.step() == STEPS[2]
    assert cluster.step() == []


def test_what_could_not_be_written_is_decided_again():
    cluster = a_move()
    first, again = ([a for a in cluster.plan().actions if type(a) is not Decide] for _ in range(2))
    assert first == again != []
