import pytest

from gearfall.core.ids import ModelName
from gearfall.core.records import ReplicaState
from gearfall.scheduling.autoscaler import (
    ModelLimits,
    SchedulerPolicy,
    evictable_at,
    limits_by_model,
    scale_model,
)
from gearfall.scheduling.autoscaler_load import ModelLoad
from gearfall.scheduling.snapshot import Hosted, Waiting
from tests.gearfall.scheduling.clusters import assignment, by_name, deployment, replica

POLICY = SchedulerPolicy(keep_alive_s=300.0, min_residency_s=5.0, patience_s=20.0)
LIMITS = ModelLimits(0, 3, 60.0)


def hosted(worker_id="a", *, at=0.0, **fields):
    return Hosted(assignment(worker_id=worker_id, at=at), replica(worker_id=worker_id, **fields))


def starting(worker_id="a"):
    return Hosted(assignment(worker_id=worker_id), None)


@pytest.mark.parametrize(
    ("have", "jobs", "missing"),
    [
        ((), 1, 1),
        ((), 500, 1),
        ((starting(),), 500, 2),
        ((starting(),), 1, 0),
        ((hosted(),), 1, 1),
        ((hosted(), starting("b")), 16, 0),
        ((hosted(), starting("b")), 500, 1),
        ((hosted(), hosted("b"), hosted("c")), 500, 0),
    ],
)
def test_demand_adds_what_the_waiting_jobs_need(have, jobs, missing):
    decision = scale_model(
        have, Waiting(jobs, 0.0), LIMITS, ModelLoad(), policy=POLICY, now_unix_s=10.0
    )
    assert decision.missing == missing
    assert decision.surplus == ()


def test_keep_alive_runs_from_the_last_job():
    idle = hosted(idle_since=100.0)
    early = scale_model((idle,), None, LIMITS, ModelLoad(), policy=POLICY, now_unix_s=159.9)
    assert (early.surplus, early.next_due_unix_s) == ((), 160.0)
    due = scale_model((idle,), None, LIMITS, ModelLoad(), policy=POLICY, now_unix_s=160.0)
    assert [key for key, _ in due.surplus] == [idle.key]
    assert due.next_due_unix_s is None


def test_a_busy_replica_has_no_due_time():
    decision = scale_model((hosted(),), None, LIMITS, ModelLoad(), policy=POLICY, now_unix_s=1e9)
    assert (decision.surplus, decision.next_due_unix_s) == ((), None)


def test_a_model_with_demand_is_never_scaled_down():
    idle = tuple(hosted(name, idle_since=1.0) for name in "abcde")
    assert (
        scale_model(
            idle, Waiting(1, 0.0), LIMITS, ModelLoad(), policy=POLICY, now_unix_s=1e9
        ).surplus
        == ()
    )


def test_minimum_residency_holds_back_an_expired_keep_alive():
    young = hosted(at=100.0, idle_since=101.0, total_s=1.0)
    decision = scale_model(
        (young,), None, ModelLimits(0, 1, 0.0), ModelLoad(), policy=POLICY, now_unix_s=104.0
    )
    assert (decision.surplus, decision.next_due_unix_s) == ((), 111.0)
    quick = hosted(at=100.0, idle_since=101.0, total_s=0.25)
    decision = scale_model(
        (quick,), None, ModelLimits(0, 1, 0.0), ModelLoad(), policy=POLICY, now_unix_s=104.0
    )
    assert (decision.surplus, decision.next_due_unix_s) == ((), 105.25)


def test_min_replicas_are_started_and_kept():
    limits = ModelLimits(1, 3, 60.0)
    assert scale_model((), None, limits, ModelLoad(), policy=POLICY, now_unix_s=0.0).missing == 1
    pair = (hosted("a", idle_since=10.0), hosted("b", idle_since=5.0))
    decision = scale_model(pair, None, limits, ModelLoad(), policy=POLICY, now_unix_s=1e6)
    assert [key[0] for key, _ in decision.surplus] == ["b"]
    last = scale_model(pair[:1], None, limits, ModelLoad(), policy=POLICY, now_unix_s=20.0)
    assert (last.surplus, last.next_due_unix_s) == ((), None)


def test_beyond_max_the_idle_go_before_the_busy():
    three = (hosted("a"), hosted("b", idle_since=99.0), hosted("c"))
    decision = scale_model(
        three, None, ModelLimits(0, 1, 60.0), ModelLoad(), policy=POLICY, now_unix_s=100.0
    )
    assert [key[0] for key, _ in decision.surplus] == ["b", "a"]


def test_limits_are_the_largest_over_deployments():
    found = limits_by_model(
        [ModelName(name) for name in ("small", "large", "plain")],
        by_name(
            deployment("small", "large", name="x", max_replicas=2, keep_alive_s=10.0),
            deployment("small", name="y", min_replicas=1, keep_alive_s=50.0),
        ),
        POLICY,
    )
    assert found[ModelName("small")] == ModelLimits(1, 2, 50.0)
    assert found[ModelName("large")] == ModelLimits(0, 2, 10.0)
    assert found[ModelName("plain")] == ModelLimits(0, 1, 300.0)


@pytest.mark.parametrize(
    ("candidate", "has_demand", "spare", "expected"),
    [
        (hosted(idle_since=50.0), False, True, 5.0),
        (hosted(idle_since=50.0), True, True, None),
        (hosted(idle_since=50.0), False, False, None),
        (hosted(), False, True, 120.0),
        (hosted(state=ReplicaState.FAILED), False, True, 5.0),
        (hosted(state=ReplicaState.LOADING), False, True, None),
        (starting(), False, True, None),
    ],
)
def test_who_may_make_room_and_when(candidate, has_demand, spare, expected):
    found = evictable_at(
        candidate,
        has_demand=has_demand,
        spare=spare,
        wanted_since_unix_s=100.0,
        policy=POLICY,
    )
    assert found == expected
