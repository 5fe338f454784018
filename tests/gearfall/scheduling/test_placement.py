from dataclasses import replace

import pytest

from gearfall.core.ids import ModelName
from gearfall.core.records import Tier
from gearfall.scheduling.placement import MakeRoom, Nodes, Place, Victim, Wait, place
from gearfall.scheduling.snapshot import WorkerRoom
from gearfall.scheduling.start_costs import StartCosts
from tests.gearfall.scheduling.clusters import MIB, by_node, model, node, worker

COSTS = StartCosts()


def hosts(*names):
    return frozenset(ModelName(name) for name in names)


def rooms(*workers, **used):
    return {w.worker_id: WorkerRoom(w, used_bytes=used.get(w.worker_id, 0)) for w in workers}


def run(record, rooms_by_worker, nodes, victims=(), now=100.0, loading=None):
    seen = Nodes(nodes, loading or {})
    return place(record, rooms_by_worker, seen, victims, costs=COSTS, now_unix_s=now)


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


def test_a_node_that_could_fetch_it_is_slower_than_one_that_has_it():
    a, b = worker("a", node_id="n1"), worker("b", node_id="n2")
    nodes = by_node(node("n1", on_ssd=["small"]), node("n2", on_ssd=[]))
    record = model(nodes=("n1",), size_bytes=1 << 29)
    placed = run(record, rooms(a, b), nodes)
    assert isinstance(placed, Place)
    assert placed.worker_id == "a"
    assert placed.prediction.from_tier is Tier.SSD
    [(other, why)] = placed.rejected
    assert other == "worker b"
    assert "0.54 GB from remote at 0.25 GB/s (assumed) 2.15 s" in why

    full = run(record, rooms(a, b, a=1 << 30), nodes)
    assert isinstance(full, Place)
    assert full.worker_id == "b"
    assert full.prediction.from_tier is Tier.REMOTE
    assert "from remote" in full.reason


def test_a_fast_link_beats_a_slow_disk():
    a, b = worker("a", node_id="n1"), worker("b", node_id="n2")
    nodes = by_node(
        node("n1", on_ssd=["small"], ssd_bytes_per_s=1e8),
        node("n2", on_ssd=[], remote_bytes_per_s=1e9),
    )
    placed = run(model(nodes=("n1",), size_bytes=1 << 29), rooms(a, b), nodes)
    assert isinstance(placed, Place)
    assert placed.worker_id == "b"


def test_a_model_of_a_url_may_go_where_nobody_has_it():
    nodes = by_node(node("n1", on_ssd=[]))
    placed = run(model(nodes=(), source="s3://b/m"), rooms(worker("a", node_id="n1")), nodes)
    assert isinstance(placed, Place)


def test_a_store_that_is_busy_loading_counts_with_what_it_still_has_to_load():
    a, b = worker("a", node_id="n1"), worker("b", node_id="n2")
    both = ("n1", "n2")
    nodes = by_node(
        node("n1", ssd_bytes_per_s=1.2e9, on_ssd=["small", "other"]),
        node("n2", ssd_bytes_per_s=1e9, on_ssd=["small"]),
    )
    record, other = model(nodes=both, size_bytes=1 << 29), model("other", nodes=("n1",))
    idle = run(record, rooms(a, b), nodes)
    assert isinstance(idle, Place)
    assert idle.worker_id == "a"
    busy = run(
        record, rooms(a, b), nodes, loading={"n1": {"other": replace(other, size_bytes=10**9)}}
    )
    assert isinstance(busy, Place)
    assert busy.worker_id == "b"
    same = run(record, rooms(a, b), nodes, loading={"n1": {"small": record}})
    assert isinstance(same, Place)
    assert same.worker_id == "a"
    far = run(record, rooms(a, b), nodes, loading={"n1": {"far": model("far", source="s3://b/m")}})
    assert isinstance(far, Place)
    assert far.worker_id == "a"


def test_equal_starts_go_where_most_memory_is_free():
    a, b = worker("a"), worker("b")
    placed = run(model(), rooms(a, b, a=500 * MIB), by_node(node()))
    assert isinstance(placed, Place)
    assert placed.worker_id == "b"


def test_every_reason_against_a_worker_is_given():
    cases = {
        "no-store": (WorkerRoom(worker("no-store", node_id="n9")), "store of node n9 is not there"),
        "other": (WorkerRoom(worker("other", node_id="n2")), "has other bytes under that name"),
        "pool": (WorkerRoom(worker("pool", node_id="n3")), "pool of node n3 takes 1048576 bytes"),
        "drains": (WorkerRoom(worker("drains", max_replicas=0)), "takes no replicas"),
        "tiny": (WorkerRoom(worker("tiny", memory_bytes=MIB)), "in all"),
        "has-it": (WorkerRoom(worker("has-it"), hosting=hosts("small")), "already"),
    }
    nodes = by_node(node(), node("n2", on_ssd=["small"]), node("n3", dram_bytes=MIB))
    result = run(model(), {name: room for name, (room, _) in cases.items()}, nodes)
    assert isinstance(result, Wait)
    assert result.next_due_unix_s is None
    reasons = dict(result.rejected)
    assert len(reasons) == len(cases)
    for name, (_, text) in cases.items():
        assert text in reasons[f"worker {name}"]
    nowhere = run(model(nodes=("n9",)), rooms(worker(node_id="n1")), by_node(node("n1", on_ssd=())))
    assert isinstance(nowhere, Wait)
    assert "n1 does not hold the checkpoint, and no live node" in nowhere.rejected[0][1]


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


@pytest.mark.parametrize(
    ("idle_since", "due", "remote_bytes_per_s", "leaving", "expected"),
    [
        (50.0, 0.0, 0.0, False, MakeRoom),
        (50.0, 0.0, 0.0, True, Wait),
        (0.0, 0.0, 0.0, False, Place),  # it runs jobs
        (50.0, 110.0, 0.0, False, Place),  # it may not leave yet
        (50.0, 0.0, 1e10, False, Place),  # fetching is faster than reading here
    ],
)
def test_an_idle_replica_leaves_where_the_model_is_rather_than_it_is_fetched(
    idle_since, due, remote_bytes_per_s, leaving, expected
):
    holder = full_room("other")
    if leaving:
        holder = holder.with_leaving("other", 400 * MIB)
    far = WorkerRoom(worker("b", node_id="n2"))
    nodes = by_node(
        node(on_ssd=["small", "other"]),
        node("n2", on_ssd=[], remote_bytes_per_s=remote_bytes_per_s),
    )
    victims = [victim("other", idle_since=idle_since, at=due)]
    result = run(model(size_bytes=100 * MIB), {"a": holder, "b": far}, nodes, victims)
    assert isinstance(result, expected)
    if isinstance(result, MakeRoom):
        assert result.worker_id == "a"
        assert "from remote" in dict(result.rejected)["worker b"]
    if isinstance(result, Place):
        assert result.worker_id == "b"
