"""What becomes of those whose best place went to another one in the same decision."""

from gearfall.core.ids import ModelName
from gearfall.core.records import ReplicaState
from tests.gearfall.scheduling.clusters import MIB, assignment, demand, model, node, replica, worker
from tests.gearfall.scheduling.deciding_cluster import NOW, ROOM, Cluster

SIZE = 400 * MIB
LONG_AGO = NOW - 50.0


def two_nodes(*records, places=2, load_s=8.0):
    """Both models' bytes are in `n1`'s memory, and on the slow disk of `n2`, which is free."""
    names = ("p", "q", "x")
    slow = SIZE / load_s
    return Cluster(
        node("n1", resident=("p", "q"), on_ssd=names, ssd_bytes_per_s=slow),
        node("n2", on_ssd=names, ssd_bytes_per_s=slow),
        worker("a", node_id="n1", memory_bytes=places * ROOM, max_replicas=places),
        worker("b", node_id="n2", memory_bytes=2 * ROOM, max_replicas=2),
        *(model(name, nodes=("n1", "n2"), size_bytes=SIZE) for name in names),
        *records,
    )


def idle(name, worker_id):
    return (
        assignment(name, worker_id, memory_bytes=ROOM),
        replica(name, worker_id, memory_bytes=ROOM, idle_since=LONG_AGO),
    )


def test_who_lost_a_free_place_has_an_idle_one_leave_beside_it():
    cluster = two_nodes(*idle("x", "a"), demand("p", since=NOW - 1), demand("q", since=NOW))
    done = cluster.step()
    started = [each for each in done if each[0] == "assign"]
    assert [each[1] for each in started] == ["a"], "where the bytes are"
    assert ("unassign", "a", "x") in done, "makes room for the other one there"
    (late,) = {"p", "q"} - {started[0][2]}
    assert cluster.decision(late).decision == "wait"
    assert cluster.decision(late).worker_id == "a"


def test_who_lost_its_place_takes_the_next_best_one_where_nobody_can_leave():
    waiting = demand("p", jobs=2, since=NOW - 1), demand("q", since=NOW)
    cluster = two_nodes(*waiting, places=1, load_s=1.0)
    found = {each[2]: each[1] for each in cluster.step() if each[0] == "assign"}
    assert sorted(found.values()) == ["a", "b"]
    assert found["p"] == "a", "two jobs weigh more than one"


def test_a_model_goes_back_to_where_its_own_replica_is_just_leaving():
    leaving = replica("p", "a", state=ReplicaState.DRAINING, memory_bytes=ROOM, idle_since=LONG_AGO)
    cluster = two_nodes(leaving, demand("p", since=NOW))
    assert cluster.step() == [], "its bytes are there: the disk of the other node is no match"
    assert cluster.decision("p").worker_id == "a"
    cluster.now += 0.05
    cluster.gone(leaving)
    assert cluster.step() == [("assign", "a", "p")]


def test_a_model_whose_leaving_replica_takes_long_starts_elsewhere():
    leaving = replica("p", "a", state=ReplicaState.DRAINING, memory_bytes=ROOM)
    cluster = two_nodes(leaving, demand("p", since=NOW))
    assert cluster.step() == [("assign", "b", "p")], "nobody says when its job ends"


def test_a_worker_that_takes_no_more_is_nothing_to_come_back_to():
    leaving = replica("p", "a", state=ReplicaState.DRAINING, memory_bytes=ROOM, idle_since=LONG_AGO)
    cluster = two_nodes(leaving, demand("p", since=NOW))
    cluster.put(worker("a", node_id="n1", memory_bytes=2 * ROOM, max_replicas=0))
    assert cluster.step() == [("assign", "b", "p")]
    assert cluster.decision(ModelName("p")).decision == "start"
