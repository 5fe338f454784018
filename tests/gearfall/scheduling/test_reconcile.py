"""Properties of one decision step, and of many in a row against a simulated fleet."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.records import ReplicaState
from gearfall.core.start_timeline import StartTimeline
from gearfall.scheduling.actions import Assign, Decide, Unassign
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.snapshot import ClusterSnapshot, rooms_of
from tests.gearfall.scheduling.clusters import (
    MIB,
    assignment,
    by_key,
    by_name,
    by_node,
    by_worker,
    demand,
    deployment,
    model,
    node,
    replica,
    worker,
)

POLICY = SchedulerPolicy(keep_alive_s=60.0, min_residency_s=2.0, patience_s=20.0)


def step(snapshot, now=100.0, policy=POLICY):
    return decide(Fleet.of(snapshot), StartCosts(), policy, now)


def assigned(plan):
    return [(a.assignment.worker_id, a.assignment.model) for a in plan.actions if type(a) is Assign]


def unassigned(plan):
    return [a.key for a in plan.actions if type(a) is Unassign]


def decisions(plan):
    return {a.decision.model: a.decision for a in plan.actions if type(a) is Decide}


def cluster(**fields):
    base = ClusterSnapshot(
        models=by_name(model()), nodes=by_node(node()), workers=by_worker(worker())
    )
    return replace(base, **fields)


def test_nothing_wanted_nothing_done():
    assert step(cluster()).actions == ()


def test_five_hundred_waiting_jobs_are_one_assignment():
    routers = [demand(jobs=100, router=f"r{i}") for i in range(5)]
    plan = step(cluster(demand=tuple(routers)))
    assert assigned(plan) == [("worker-a", "small")]
    assert decisions(plan)["small"].decision == "start"
    again = replace(
        cluster(demand=tuple(routers)),
        assignments=by_key(*[a.assignment for a in plan.actions if type(a) is Assign]),
    )
    assert step(again).actions == ()


def test_dead_workers_removed_models_and_draining_replicas_lose_their_assignments():
    plan = step(
        cluster(
            assignments=by_key(
                assignment(worker_id="dead"), assignment("removed"), assignment("small")
            ),
            replicas=by_key(replica("small", state=ReplicaState.DRAINING)),
        )
    )
    assert sorted(unassigned(plan)) == [
        ("dead", "small"),
        ("worker-a", "removed"),
        ("worker-a", "small"),
    ]


def test_a_worker_that_takes_no_replicas_any_more_gives_up_its_assignments():
    plan = step(
        cluster(workers=by_worker(worker(max_replicas=0)), assignments=by_key(assignment()))
    )
    assert unassigned(plan) == [("worker-a", "small")]


def test_memory_pressure_evicts_the_idle_one_and_starts_when_it_is_gone():
    tight = worker(memory_bytes=150 * MIB)
    models = by_name(model("small"), model("large"))
    before = cluster(
        models=models,
        workers=by_worker(tight),
        assignments=by_key(assignment("small", at=0.0)),
        replicas=by_key(replica("small", idle_since=50.0)),
        demand=(demand("large", since=99.0),),
    )
    plan = step(before)
    assert unassigned(plan) == [("worker-a", "small")]
    assert assigned(plan) == []
    assert decisions(plan)["large"].decision == "wait"
    assert decisions(plan)["small"].decision == "stop"
    leaving = replace(before, assignments={}, decisions=decisions(plan))
    waiting = step(leaving)
    assert unassigned(waiting) == assigned(waiting) == []
    assert assigned(step(replace(leaving, replicas={}))) == [("worker-a", "large")]


def test_a_model_comes_back_when_it_is_gone_whoever_else_is_placed_there():
    before = cluster(
        models=by_name(model("small"), model("large")),
        replicas=by_key(replica("small", state=ReplicaState.DRAINING)),
        demand=(demand("small", since=99.0), demand("large", since=98.0)),
    )
    plan = step(before)
    assert assigned(plan) == [("worker-a", "large")]
    assert decisions(plan)["small"].decision == "wait"
    assert assigned(step(replace(before, replicas={}, demand=(demand("small"),)))) == [
        ("worker-a", "small")
    ]


def test_without_demand_min_replicas_take_no_room_from_others():
    full = cluster(
        models=by_name(model("small"), model("large")),
        workers=by_worker(worker(memory_bytes=150 * MIB)),
        deployments=by_name(deployment("large", min_replicas=1)),
        assignments=by_key(assignment("small")),
        replicas=by_key(replica("small", idle_since=90.0)),
    )
    plan = step(full)
    assert unassigned(plan) == []
    assert decisions(plan)["large"].decision == "wait"


def test_a_standing_wait_is_not_written_again():
    alone = cluster(workers={}, demand=(demand(),))
    plan = step(alone)
    assert set(decisions(plan)) == {"small"}
    assert step(replace(alone, decisions=decisions(plan)), now=101.0).actions == ()


def test_looks_again_when_keep_alive_ends():
    idle = cluster(assignments=by_key(assignment()), replicas=by_key(replica(idle_since=80.0)))
    assert step(idle).next_due_unix_s == 140.0
    assert unassigned(step(idle, now=140.0)) == [("worker-a", "small")]


NAMES = ("m0", "m1", "m2", "m3")
WORKERS = ("w0", "w1", "w2")


@st.composite
def clusters(draw):
    models = [
        model(name, size_bytes=draw(st.integers(1, 600)) * MIB, nodes=draw(node_sets()))
        for name in NAMES
    ]
    workers = [
        worker(
            name,
            node_id=draw(st.sampled_from(("n0", "n1"))),
            memory_bytes=draw(st.integers(1, 1200)) * MIB,
            max_replicas=draw(st.integers(0, 3)),
        )
        for name in WORKERS[: draw(st.integers(0, 3))]
    ]
    deployments = [
        deployment(
            *draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True)),
            name=name,
            min_replicas=draw(st.integers(0, 1)),
            max_replicas=draw(st.integers(1, 3)),
            keep_alive_s=draw(st.sampled_from((0.0, 30.0, 300.0))),
        )
        for name in ("d0", "d1")[: draw(st.integers(0, 2))]
    ]
    demanded = draw(st.lists(st.sampled_from(NAMES), unique=True))
    waiting = [
        demand(name, jobs=draw(st.integers(0, 40)), since=draw(st.floats(0, 100)))
        for name in demanded
    ]
    return ClusterSnapshot(
        models=by_name(*models),
        deployments=by_name(*deployments),
        nodes=by_node(node("n0", resident=draw(st.lists(st.sampled_from(NAMES)))), node("n1")),
        workers=by_worker(*workers),
        demand=tuple(waiting),
    )


def node_sets():
    return st.sampled_from((("n0",), ("n1",), ("n0", "n1")))


def apply(snapshot, plan):
    """Write a plan's assignments down as cluster state would."""
    assignments = dict(snapshot.assignments)
    for action in plan.actions:
        if isinstance(action, Assign):
            key = (action.assignment.worker_id, action.assignment.model)
            assert key not in assignments, "two assignments for one (worker, model)"
            assert key not in snapshot.replicas, "assigned while its last replica is leaving"
            assignments[key] = action.assignment
        elif isinstance(action, Unassign):
            assert key_of(action) in assignments, "deleted what is not there"
            del assignments[key_of(action)]
    return replace(snapshot, assignments=assignments, decisions=decisions(plan))


def key_of(action):
    return action.key


def settle(snapshot, now):
    """Let workers follow their assignments: start what is new, drop what is not assigned."""
    replicas = {}
    for key, record in snapshot.assignments.items():
        if key in snapshot.replicas:
            replicas[key] = snapshot.replicas[key]
        elif key[0] in snapshot.workers:
            fresh = replica(key[1], key[0], idle_since=now, memory_bytes=record.memory_bytes)
            replicas[key] = replace(fresh, timeline=StartTimeline(total_s=0.0))
    ready = {model_name for _, model_name in replicas}
    served = tuple(d for d in snapshot.demand if d.model not in ready)
    return replace(snapshot, replicas=replicas, demand=served)


def check_capacity(snapshot):
    for room in rooms_of(snapshot).values():
        assert room.used_bytes <= room.worker.memory_bytes
        assert len(room.hosting) <= room.worker.max_replicas


@given(clusters(), st.integers(1, 12))
def test_capacity_holds_at_every_step(snapshot, rounds):
    now = 100.0
    for _ in range(rounds):
        snapshot = apply(snapshot, step(snapshot, now))
        check_capacity(snapshot)
        snapshot = settle(snapshot, now)
        check_capacity(snapshot)
        now += 7.0


@given(clusters())
def test_every_demand_that_some_worker_could_hold_is_served(snapshot):
    alone = {d.model for d in snapshot.demand if fits_somewhere(snapshot, d)}
    snapshot = replace(snapshot, deployments={})
    now = 100.0
    for _ in range(40):
        snapshot = settle(apply(snapshot, step(snapshot, now)), now)
        now += 5.0
    assert alone.isdisjoint(d.model for d in snapshot.demand)


def fits_somewhere(snapshot, record):
    empty = replace(snapshot, assignments={}, replicas={}, deployments={}, demand=(record,))
    return bool(assigned(step(empty)))


@given(clusters())
def test_a_settled_cluster_stays_as_it_is(snapshot):
    """With no demand left and time standing still, nothing is started or stopped for ever."""
    now = 100.0
    for _ in range(20):
        snapshot = settle(apply(snapshot, step(snapshot, now)), now)
    plan = step(snapshot, now)
    assert assigned(plan) == []
    assert unassigned(plan) == []


BROKEN = {"state": ReplicaState.FAILED, "error": "canary differs", "failures": 2}


def test_an_unreachable_worker_is_not_counted_and_not_chosen_and_keeps_its_assignment():
    base = cluster(
        workers=by_worker(worker(), worker("worker-b")),
        assignments=by_key(assignment()),
        replicas=by_key(replica()),
        demand=(demand(),),
    )
    assert assigned(step(base)) == []
    plan = step(replace(base, unreachable=frozenset({"worker-a"})))
    assert assigned(plan) == [("worker-b", "small")]
    assert unassigned(plan) == []
    assert decisions(plan)["small"].rejected == (("worker worker-a", "its connection is broken"),)


def test_a_worker_that_is_back_in_reach_gives_up_what_is_too_much():
    plan = step(
        cluster(
            workers=by_worker(worker(), worker("worker-b")),
            assignments=by_key(assignment(), assignment(worker_id="worker-b")),
            replicas=by_key(
                replica(idle_since=90.0, total_s=0.1), replica(worker_id="worker-b", total_s=0.1)
            ),
        )
    )
    assert unassigned(plan) == [("worker-a", "small")]


def test_an_awaited_workers_assignment_stands_until_its_time():
    base = cluster(workers={}, assignments=by_key(assignment()), awaited={"worker-a": 110.0})
    plan = step(base)
    assert unassigned(plan) == []
    assert plan.next_due_unix_s == 110.0
    assert unassigned(step(base, now=110.0)) == [("worker-a", "small")]


def test_a_removed_model_is_not_kept_for_an_awaited_worker():
    plan = step(cluster(assignments=by_key(assignment("gone", "away")), awaited={"away": 110.0}))
    assert unassigned(plan) == [("away", "gone")]


def test_one_failure_is_the_workers_own_affair_and_two_are_tried_elsewhere():
    base = cluster(
        workers=by_worker(worker(), worker("worker-b")),
        assignments=by_key(assignment()),
        demand=(demand(),),
    )
    once = by_key(replica(state=ReplicaState.FAILED, idle_since=90.0, error="x", failures=1))
    assert assigned(step(replace(base, replicas=once))) == []
    for state in (ReplicaState.FAILED, ReplicaState.LOADING, ReplicaState.STARTING):
        again = by_key(replica(idle_since=90.0, **BROKEN | {"state": state}))
        assert assigned(step(replace(base, replicas=again))) == [("worker-b", "small")]


def test_a_replica_that_does_not_start_is_given_back_after_its_time():
    base = cluster(
        assignments=by_key(assignment()), replicas=by_key(replica(idle_since=50.0, **BROKEN))
    )
    assert unassigned(step(base)) == []
    assert step(base).next_due_unix_s == 110.0
    plan = step(base, now=110.0)
    assert unassigned(plan) == [("worker-a", "small")]
    assert "canary differs" in decisions(plan)["small"].reason
