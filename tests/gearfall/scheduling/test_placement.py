"""One model's places: which there are, what each takes, and in which order."""

from dataclasses import replace

import pytest

from gearfall.core.ids import JobId, ModelName, NodeId, WorkerId
from gearfall.core.job import Priority
from gearfall.core.records import ReplicaState, RunningJob, Tier
from gearfall.scheduling.autoscaler import SchedulerPolicy
from gearfall.scheduling.fleet import Fleet
from gearfall.scheduling.placement import (
    PUSH_OUT_WEIGHT,
    assess,
    find_options,
    with_nearer,
)
from gearfall.scheduling.placement_reasons import rejected_by, why_not
from gearfall.scheduling.placement_search import Search
from gearfall.scheduling.room_making import EVICTION_S, Way
from gearfall.scheduling.scene import Scene
from gearfall.scheduling.start_costs import StartCosts
from gearfall.scheduling.wants import Urgency, Want
from gearfall.scheduling.work_ahead import UNKNOWN_STEP_S
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

POLICY = SchedulerPolicy(keep_alive_s=300.0, min_residency_s=2.0, patience_s=20.0)
NOW = 100.0
BIG = 600 * MIB
SMALL = ModelName("small")


class World:
    """Records by the handful; `options` asks where the model `small` could start."""

    def __init__(self, *records, now=NOW, **wanted):
        self.fleet = Fleet()
        self.fleet.put("models", model(**wanted))
        for record in records:
            self.fleet.put(KINDS[type(record).__name__], record)
        self.scene = Scene(self.fleet, StartCosts(), POLICY, now)

    def want(self, urgency=Urgency.INTERACTIVE, since=NOW):
        self.fleet.refresh(POLICY, self.scene.now_unix_s)
        found = self.fleet.model(SMALL)
        assert found is not None
        return Want(found, urgency, since, rules=self.fleet.rules_of(SMALL))

    def options(self, urgency=Urgency.INTERACTIVE, since=NOW):
        want = self.want(urgency, since)
        return find_options(self.scene, want, Search(self.fleet, want))

    def rejected(self, *others):
        want = self.want()
        search = Search(self.fleet, want)
        return dict(rejected_by(self.scene, want, search, None, list(others)))


KINDS = {
    "ModelRecord": "models",
    "NodeRecord": "nodes",
    "WorkerRecord": "workers",
    "AssignmentRecord": "assignments",
    "ReplicaRecord": "replicas",
    "DemandRecord": "demand",
    "DeploymentRecord": "deployments",
}


def where(options):
    return [(option.way, *option.workers) for option in options]


def hosts(name, worker_id, *, at=0.0, size=BIG, **fields):
    """A model's registration, assignment and replica."""
    return (
        model(name, size_bytes=10 * MIB, nodes=("n1", "n2", "node-a")),
        assignment(name, worker_id, memory_bytes=size, at=at),
        replica(name, worker_id, memory_bytes=size, **fields),
    )


def runs(*tokens_left, prompt=100, priority=Priority.INTERACTIVE):
    """The fields of a replica with jobs that have so many tokens to go, a step taking 0.1 s."""
    jobs = tuple(
        RunningJob(JobId(f"j{i}"), prompt, 0, left, priority) for i, left in enumerate(tokens_left)
    )
    return {"jobs": jobs, "running_jobs": len(jobs), "seen_unix_s": NOW, "step_s": 0.1}


def busy(name, worker_id, *tokens_left, at=0.0, size=BIG, **fields):
    registered, assigned, record = hosts(name, worker_id, at=at, size=size)
    return registered, assigned, replace(record, **runs(*tokens_left, **fields))


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


def full_of(*replicas):
    """One worker whose memory just takes what is on it."""
    return World(
        node(), worker("a", memory_bytes=len(replicas) // 3 * BIG), *replicas, size_bytes=10 * MIB
    )


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
        (99.0, 99.0, 0.0, (Way.FREE, "b")),  # it may not leave yet
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
