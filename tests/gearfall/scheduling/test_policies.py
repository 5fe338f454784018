"""The policies that ours is compared with: where each starts a model, and what makes room."""

from dataclasses import replace

import pytest

from gearfall.core.ids import JobId, ModelName, NodeId, WorkerId
from gearfall.core.records import DecisionRecord, RunningJob
from gearfall.scheduling.actions import Assign, Unassign, Undecide
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.policies import PlacementPolicy, decide_step
from gearfall.scheduling.reconcile import Plan
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.snapshot import ClusterSnapshot
from tests.gearfall.scheduling.clusters import assignment, demand, model, node, replica, worker

MODELS = {m: model(m, nodes=("near", "far")) for m in map(ModelName, ("a", "b"))}
SIMPLE = [policy for policy in PlacementPolicy if policy is not PlacementPolicy.OURS]
NOW_S = 1000.0
B_NEAR = (WorkerId("w-near"), ModelName("b"))


def cluster(*, busy: bool = False, since: float = NOW_S) -> ClusterSnapshot:
    """Model a waits; its bytes are in DRAM on `near`, on SSD on `far`; b may run on `near`."""
    nodes = {
        NodeId("near"): node("near", resident=("a", "b"), on_ssd=("a", "b"), ssd_bytes_per_s=1e6),
        NodeId("far"): node("far", on_ssd=("a", "b"), ssd_bytes_per_s=1e6),
    }
    workers = [worker("w-near", node_id="near"), worker("w-far", node_id="far")]
    return ClusterSnapshot(
        models=MODELS,
        nodes=nodes,
        workers={each.worker_id: replace(each, max_replicas=1) for each in workers},
        assignments={B_NEAR: assignment("b", "w-near", at=0.0)} if busy else {},
        replicas={B_NEAR: replica("b", "w-near", total_s=1.0)} if busy else {},
        demand=(demand("a", since=since),),
    )


def decide(policy: PlacementPolicy, snapshot: ClusterSnapshot, seed: int = 0) -> Plan:
    step = decide_step(policy, seed=seed)
    return step(Fleet.of(snapshot), StartCosts(), SchedulerPolicy(), NOW_S)


def started_on(plan: Plan) -> list[str]:
    return [each.assignment.worker_id for each in plan.actions if isinstance(each, Assign)]


def taken_back(plan: Plan) -> list[tuple[str, str]]:
    return [each.key for each in plan.actions if isinstance(each, Unassign)]


@pytest.mark.parametrize("policy", [PlacementPolicy.LOCALITY, PlacementPolicy.PREEMPT])
def test_those_that_know_where_bytes_are_start_there(policy):
    assert started_on(decide(policy, cluster())) == ["w-near"]


def test_random_takes_any_worker_and_the_same_one_for_the_same_seed():
    plans = [decide(PlacementPolicy.RANDOM, cluster(), seed) for seed in range(20)]
    assert {each for plan in plans for each in started_on(plan)} == {"w-near", "w-far"}
    assert plans == [decide(PlacementPolicy.RANDOM, cluster(), seed) for seed in range(20)]


def test_least_loaded_takes_the_worker_that_hosts_nothing():
    snapshot = cluster(busy=True)
    two = {key: replace(each, max_replicas=2) for key, each in snapshot.workers.items()}
    plan = decide(PlacementPolicy.LEAST_LOADED, replace(snapshot, workers=two))
    assert started_on(plan) == ["w-far"]


@pytest.mark.parametrize(
    ("policy", "starts", "leaves"),
    [
        (PlacementPolicy.RANDOM, ["w-far"], []),
        (PlacementPolicy.LEAST_LOADED, ["w-far"], []),
        (PlacementPolicy.LOCALITY, [], []),
        (PlacementPolicy.PREEMPT, [], [("w-near", "b")]),
    ],
)
def test_when_the_nearest_worker_is_busy(policy, starts, leaves):
    plan = decide(policy, cluster(busy=True))
    assert (started_on(plan), taken_back(plan)) == (starts, leaves)


def test_locality_waits_no_longer_than_the_policys_patience():
    waited_s = SchedulerPolicy().patience_s + 1.0
    plan = decide(PlacementPolicy.LOCALITY, cluster(busy=True, since=NOW_S - waited_s))
    assert taken_back(plan) == [("w-near", "b")]


def test_a_job_that_came_first_is_not_preempted_for_one_that_came_later():
    snapshot = cluster(busy=True)
    waiting = (demand("a", since=NOW_S), demand("b", since=NOW_S - 1.0))
    plan = decide(PlacementPolicy.PREEMPT, replace(snapshot, demand=waiting))
    assert taken_back(plan) == []


@pytest.mark.parametrize(("tokens", "leaves"), [(900, [("w-near", "b")]), (1100, [])])
def test_a_job_is_not_preempted_before_it_went_on_from_where_it_was(tokens, leaves):
    snapshot = cluster(busy=True)
    started = {B_NEAR: replace(snapshot.assignments[B_NEAR], assigned_unix_s=NOW_S - 3.0)}
    running = RunningJob(JobId("job"), tokens - 100, 100, 5000)
    told = replace(snapshot.replicas[B_NEAR], jobs=(running,), move_s_per_token=1e-3)
    snapshot = replace(snapshot, assignments=started, replicas={B_NEAR: told})
    assert taken_back(decide(PlacementPolicy.PREEMPT, snapshot)) == leaves, "up for 2 s of 3"


@pytest.mark.parametrize("policy", SIMPLE)
def test_nothing_is_assigned_twice_and_idle_replicas_make_room(policy):
    snapshot = cluster(busy=True)
    idle = {B_NEAR: replica("b", "w-near", idle_since=NOW_S - 1.0, total_s=1.0)}
    near = {key: each for key, each in snapshot.workers.items() if key == "w-near"}
    plan = decide(policy, replace(snapshot, replicas=idle, workers=near))
    assert (started_on(plan), taken_back(plan)) == ([], [("w-near", "b")])


@pytest.mark.parametrize("policy", SIMPLE)
def test_what_was_decided_of_a_removed_model_goes(policy):
    names = (ModelName("a"), ModelName("removed"))
    decided = {name: DecisionRecord(name, 1.0, "wait", "") for name in names}
    plan = decide(policy, replace(cluster(), decisions=decided))
    assert [each.model for each in plan.actions if isinstance(each, Undecide)] == ["removed"]
