from dataclasses import replace

from gearfall.core.ids import ModelName
from gearfall.core.records import Tier
from services.scheduler.estimator import StartCosts
from services.scheduler.placement import MakeRoom, Place, Victim, Wait, place
from services.scheduler.snapshot import WorkerRoom
from tests.services.scheduler.clusters import MIB, by_node, model, node, worker

COSTS = StartCosts()


def hosts(*names):
    return frozenset(ModelName(name) for name in names)


def rooms(*workers, **used):
    return {w.worker_id: WorkerRoom(w, used_bytes=used.get(w.worker_id, 0)) for w in workers}


def run(record, rooms_by_worker, nodes, victims=(), now=100.0):
    return place(record, rooms_by_worker, nodes, victims, costs=COSTS, now_unix_s=now)


def test_a_resident_checkpoint_beats_a_faster_disk():
    a, b = worker("a", node_id="n1"), worker("b", node_id="n2")
    nodes = by_node(node("n1", ssd_bytes_per_s=1e12), node("n2", resident=["small"]))
    placed = run(model(nodes=("n1", "n2"), size_bytes=1 << 29), rooms(a, b), nodes)
    assert isinstance(placed, Place)
    assert placed.worker_id == "b"
    assert placed.prediction.from_tier is Tier.DRAM
    assert placed.prediction.load_s == 0.0
    assert placed.rejected[0][0] == "worker a"
    assert placed.rejected[0][1].startswith("starts in ")


def test_the_faster_disk_wins_among_cold_ones():
    a, b = worker("a", node_id="n1"), worker("b", node_id="n2")
    nodes = by_node(node("n1", ssd_bytes_per_s=1e8), node("n2", ssd_bytes_per_s=2e9))
    placed = run(model(nodes=("n1", "n2"), size_bytes=1 << 29), rooms(a, b), nodes)
    assert isinstance(placed, Place)
    assert placed.worker_id == "b"


def test_equal_starts_go_where_most_memory_is_free():
    a, b = worker("a"), worker("b")
    placed = run(model(), rooms(a, b, a=500 * MIB), by_node(node()))
    assert isinstance(placed, Place)
    assert placed.worker_id == "b"


def test_every_reason_against_a_worker_is_given():
    cases = {
        "no-store": (WorkerRoom(worker("no-store", node_id="n9")), "store of node n9 is not there"),
        "no-copy": (WorkerRoom(worker("no-copy", node_id="n2")), "does not hold the checkpoint"),
        "drains": (WorkerRoom(worker("drains", max_replicas=0)), "takes no replicas"),
        "tiny": (WorkerRoom(worker("tiny", memory_bytes=MIB)), "in all"),
        "has-it": (WorkerRoom(worker("has-it"), hosting=hosts("small")), "already"),
    }
    result = run(
        model(), {name: room for name, (room, _) in cases.items()}, by_node(node(), node("n2"))
    )
    assert isinstance(result, Wait)
    assert result.next_due_unix_s is None
    reasons = dict(result.rejected)
    assert len(reasons) == len(cases)
    for name, (_, text) in cases.items():
        assert text in reasons[f"worker {name}"]


def test_replica_count_is_a_limit_of_its_own():
    full = WorkerRoom(worker("a", max_replicas=1), hosting=hosts("other"))
    result = run(model(), {"a": full}, by_node(node()))
    assert isinstance(result, Wait)
    assert "1 of at most 1" in dict(result.rejected)["worker a"]


def victim(name, *, idle_since, at=0.0, size=400 * MIB, worker_id="a"):
    return Victim((worker_id, name), size, at, idle_since)


def full_room(*names):
    return WorkerRoom(
        worker("a", memory_bytes=len(names) * 400 * MIB),
        used_bytes=len(names) * 400 * MIB,
        hosting=hosts(*names),
    )


def test_the_least_recently_used_makes_room():
    victims = [victim("new", idle_since=50.0), victim("old", idle_since=10.0)]
    result = run(model(), {"a": full_room("new", "old")}, by_node(node()), victims)
    assert isinstance(result, MakeRoom)
    assert [v.key[1] for v in result.victims] == ["old"]


def test_a_busy_one_goes_only_where_the_idle_ones_do_not_suffice():
    victims = [victim("busy", idle_since=0.0), victim("idle", idle_since=90.0)]
    small = run(model(), {"a": full_room("busy", "idle")}, by_node(node()), victims)
    assert isinstance(small, MakeRoom)
    assert [v.key[1] for v in small.victims] == ["idle"]
    large = model(size_bytes=600 * MIB)
    both = run(large, {"a": full_room("busy", "idle")}, by_node(node()), victims)
    assert isinstance(both, MakeRoom)
    assert [v.key[1] for v in both.victims] == ["idle", "busy"]


def test_waits_for_a_replica_that_is_leaving_already():
    room = full_room("old", "new").with_leaving("old", 400 * MIB)
    result = run(model(), {"a": room}, by_node(node()), [victim("new", idle_since=1.0)])
    assert isinstance(result, Wait)
    assert "room is being made on worker a" in result.reason


def test_says_when_the_first_may_leave():
    victims = [victim("x", idle_since=1.0, at=120.0), victim("y", idle_since=1.0, at=110.0)]
    result = run(model(), {"a": full_room("x", "y")}, by_node(node()), victims)
    assert isinstance(result, Wait)
    assert result.next_due_unix_s == 110.0


def test_a_leaving_replica_is_counted_once():
    room = full_room("old")
    once = room.with_leaving("old", 400 * MIB)
    assert once.with_leaving("old", 400 * MIB) == once
    assert replace(once) == once
