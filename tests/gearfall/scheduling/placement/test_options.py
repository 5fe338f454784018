"""One model's places: which there are, what each takes, and in which order."""

from dataclasses import replace

import pytest

from gearfall.core.records import ReplicaState
from gearfall.core.tiers import Tier
from gearfall.scheduling.placement.room_making import EVICTION_S, Way
from gearfall.scheduling.placement.work_ahead import UNKNOWN_STEP_S
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
from tests.gearfall.scheduling.placement_world import (
    BIG,
    NOW,
    POLICY,
    SMALL,
    World,
    full_of,
    hosts,
    where,
)


def test_a_resident_checkpoint_beats_a_faster_disk():
    found = World(
        *(worker("a", node_id="n1"), worker("b", node_id="n2")),
        *(node("n1", ssd_bytes_per_s=1e12), node("n2", resident=["small"])),
        nodes=("n1", "n2"),
        size_bytes=1 << 29,
    ).options()
    assert where(found) == [(Way.FREE, "b"), (Way.FREE, "a")]
    assert [each.prediction.from_tier for each in found] == [Tier.DRAM, Tier.SSD]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ((node("n1", ssd_bytes_per_s=1e8), node("n2", ssd_bytes_per_s=2e9)), "b"),
        ((node("n1", on_ssd=["small"]), node("n2", on_ssd=[])), "a"),
        (
            (
                node("n1", on_ssd=["small"], ssd_bytes_per_s=1e8),
                node("n2", on_ssd=[], remote_bytes_per_s=1e9),
            ),
            "b",
        ),
    ],
)
def test_the_faster_way_of_the_bytes_wins(nodes, first):
    listed = ("n1",) if nodes[1].on_ssd is not None else ("n1", "n2")
    world = World(
        *nodes,
        *(worker("a", node_id="n1"), worker("b", node_id="n2")),
        nodes=listed,
        size_bytes=1 << 29,
    )
    assert world.options()[0].workers == (first,)


def test_a_model_of_a_url_may_go_where_nobody_has_it():
    world = World(node("n1", on_ssd=[]), worker("a", node_id="n1"), nodes=(), source="s3://b/m")
    assert where(world.options()) == [(Way.FREE, "a")]


def test_a_store_that_is_busy_loading_counts_with_what_it_still_has_to_load():
    base = (
        *(worker("a", node_id="n1"), worker("b", node_id="n2")),
        node("n1", ssd_bytes_per_s=1.2e9, on_ssd=["small", "other"]),
        node("n2", ssd_bytes_per_s=1e9, on_ssd=["small"]),
    )
    wanted = {"nodes": ("n1", "n2"), "size_bytes": 1 << 29}
    assert World(*base, **wanted).options()[0].workers == ("a",)
    other = model("other", nodes=("n1",), size_bytes=10**9)
    loading = assignment("other", "a", at=NOW)
    assert World(*base, other, loading, **wanted).options()[0].workers == ("b",)
    far = model("other", source="s3://b/m", nodes=(), size_bytes=10**9)
    far_base = (*base[:2], replace(base[2], on_ssd=(SMALL,)), base[3])
    assert World(*far_base, far, loading, **wanted).options()[0].workers == ("a",)


def test_equal_starts_go_where_most_memory_is_free():
    world = World(node(), worker("a"), worker("b"), *hosts("x", "a"))
    assert world.options()[0].workers == ("b",)


def test_every_reason_against_a_worker_is_given():
    world = World(
        *(node(), node("n2", on_ssd=["small"]), node("n3", dram_bytes=MIB)),
        *(worker("no-store", node_id="n9"), worker("other", node_id="n2")),
        *(worker("pool", node_id="n3"), worker("drains", max_replicas=0)),
        *(worker("tiny", memory_bytes=MIB), worker("has-it")),
        assignment("small", "has-it"),
        worker("full", max_replicas=1),
        *hosts("x", "full"),
    )
    cases = {
        "no-store": "store of node n9 is not there",
        "other": "has other bytes under that name",
        "pool": "pool of node n3 takes 1048576 bytes",
        "drains": "takes no replicas",
        "tiny": "in all",
        "has-it": "already",
        "full": "1 of at most 1",
    }
    assert world.options() == []
    rejected = world.rejected()
    assert len(rejected) == len(cases)
    for name, text in cases.items():
        assert text in rejected[f"worker {name}"]


def test_bytes_that_are_nowhere_make_no_place():
    world = World(node("n1", on_ssd=()), worker(node_id="n1"), nodes=("n9",))
    assert world.options() == []
    assert (
        "n1 does not hold the checkpoint, and no live node" in world.rejected()["worker worker-a"]
    )


def test_labels_have_to_match():
    gpu = replace(worker("gpu"), labels={"kind": "gpu"})
    world = World(node(), worker("cpu"), gpu, replace(deployment("small"), labels={"kind": "gpu"}))
    assert where(world.options()) == [(Way.FREE, "gpu")]
    assert world.rejected()["worker cpu"] == "its labels do not match kind=gpu"
    world.fleet.put("workers", replace(worker("cpu"), labels={"kind": "gpu"}))
    assert len(world.options()) == 2


def test_spread_goes_to_another_node_though_it_is_slower():
    records = (
        *(worker("a", node_id="n1"), worker("b", node_id="n1"), worker("c", node_id="n2")),
        *(node("n1", resident=["small"]), node("n2")),
        assignment("small", "a"),
    )
    nodes = ("n1", "n2")
    assert World(*records, nodes=nodes).options()[0].workers == ("b",)
    spread = replace(deployment("small"), spread=True)
    assert World(*records, spread, nodes=nodes).options()[0].workers == ("c",)
    alone = (*records[:2], records[3], records[5], spread)
    assert World(*alone, nodes=nodes).options()[0].workers == ("b",), "as far as there are any"


def quad(node_id="n1", count=4, **fields):
    return tuple(worker(f"{node_id}-{i}", node_id=node_id, **fields) for i in range(count))


def test_a_group_is_placed_whole_on_one_node():
    records = (
        *quad("n1", 2, memory_bytes=BIG),
        *quad("n2", 3, memory_bytes=BIG),
        *(node("n1"), node("n2")),
        replace(deployment("small"), accelerators=3),
    )
    wanted = {"nodes": ("n1", "n2"), "size_bytes": 1200 * MIB}
    world = World(*records, **wanted)
    world.fleet.put("nodes", node("n1", dram_bytes=1 << 31))
    world.fleet.put("nodes", node("n2", dram_bytes=1 << 31))
    [option] = world.options()
    assert option.workers == ("n2-0", "n2-1", "n2-2")
    share = option.memory_bytes["n2-0"]
    assert 400 * MIB < share < BIG
    assert "not enough accelerators" in world.rejected()["worker n1-0"]


def test_a_groups_victims_are_on_all_its_workers():
    records = (
        *quad("n1", 2, memory_bytes=BIG),
        *hosts("x", "n1-0", idle_since=1.0),
        *hosts("y", "n1-1", idle_since=1.0),
        node("n1"),
        replace(deployment("small"), accelerators=2),
    )
    [option] = World(*records, nodes=("n1",), size_bytes=400 * MIB).options()
    assert option.way is Way.EVICT
    assert {victim.key for victim in option.victims} == {("n1-0", "x"), ("n1-1", "y")}


def test_a_failing_replica_is_no_place():
    broken = replica("small", state=ReplicaState.FAILED, error="canary differs", failures=2)
    world = World(node(), worker(), assignment(), broken)
    assert world.options() == []
    assert world.rejected()["worker worker-a"] == "its replica does not start: canary differs"


def test_who_starts_is_waited_for_as_long_as_its_start_and_its_queue_take():
    registered, assigned, record = hosts("x", "a", at=NOW - 1.0, state=ReplicaState.LOADING)
    coming = (registered, replace(assigned, predicted_start_s=3.0), record)
    [option] = full_of(*coming).options()
    assert (option.way, option.ending) == (Way.AWAIT, ("x",))
    assert option.wait_s == pytest.approx(2.0 + POLICY.min_residency_s + EVICTION_S)
    queued = replace(demand("x", jobs=32), prompt_tokens=0, output_tokens=32 * 400)
    [later] = full_of(*coming, queued).options()
    assert later.wait_s == pytest.approx(2.0 + 2 * 400 * UNKNOWN_STEP_S + EVICTION_S)
    assert full_of(*coming, deployment("x", min_replicas=1)).options() == []
