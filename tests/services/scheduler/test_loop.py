"""The loop against cluster state in memory: leadership, fencing, and what a decision leads to."""

import asyncio
import contextlib

import pytest

from gearfall.core.errors import Conflict
from gearfall.core.ids import ModelName
from gearfall.core.records import ReplicaState
from gearfall.infra.failpoints import RULES_VARIABLE, arm_failpoints
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_keys import encode_record, key_of_record
from gearfall.infra.state.memory_state import MemoryState
from gearfall.scheduling.actions import Assign
from gearfall.scheduling.estimates.start_costs import error_quantile
from gearfall.scheduling.reconcile import decide
from services.scheduler.reachability import LEASE_GRACE_S
from services.scheduler.term import TURNS_TO_STATE
from tests.gearfall.scheduling.clusters import (
    MIB,
    WORKER,
    assignment,
    demand,
    deployment,
    model,
    replica,
    worker,
)
from tests.services.scheduler.loop_fleet import NOW, Fleet


class TellingDecide:
    """Decides as ever, and tells when it has decided to start something."""

    def __init__(self) -> None:
        self.to_start = asyncio.Event()

    def __call__(self, fleet, costs, policy, now_unix_s):
        plan = decide(fleet, costs, policy, now_unix_s)
        if any(isinstance(each, Assign) for each in plan.actions):
            self.to_start.set()
        return plan


@pytest.fixture
async def fleet():
    async with contextlib.AsyncExitStack() as stack:
        yield await Fleet(stack).open()


class SlowToSend(MemoryState):
    """Cluster state whose writes of assignments are on their way some turns of the loop later."""

    def __init__(self, server, told) -> None:
        super().__init__(server)
        self.told = told

    async def put(self, key, value, *, lease=None, fence=None):
        if key.startswith("assignments/"):
            for _ in range(TURNS_TO_STATE - 2):
                await asyncio.sleep(0)
            self.told.append(("sent", key.rpartition("/")[2]))
        return await super().put(key, value, lease=lease, fence=fence)


async def test_what_was_decided_is_on_its_way_before_the_next_decision(fleet):
    told: list[tuple[str, str]] = []

    def decide_while_another_comes(records, costs, policy, now_unix_s):
        plan = decide(records, costs, policy, now_unix_s)
        started = [each.assignment.model for each in plan.actions if isinstance(each, Assign)]
        told.extend(("decided", name) for name in started)
        if started == ["small"]:
            record = demand("large")
            fleet.server.put(key_of_record("demand", record), encode_record(record), 0)
        return plan

    cluster = Cluster(SlowToSend(fleet.server, told))
    await fleet.scheduler(decide=decide_while_another_comes, cluster=cluster)
    await fleet.cluster.put_demand(demand("small"), lease=fleet.lease)
    await fleet.cluster.wait_until(lambda view: len(view.assignments) == 2)
    assert told == [(what, name) for name in ("small", "large") for what in ("decided", "sent")]


async def test_demand_leads_to_one_assignment_with_a_decision(fleet):
    await fleet.scheduler()
    for index in range(5):
        await fleet.cluster.put_demand(demand(jobs=100, router=f"r{index}"), lease=fleet.lease)
    view = await fleet.until(lambda v: "small" in v.decisions)
    assert list(view.assignments) == [(WORKER, "small")]
    assert view.decisions[ModelName("small")].decision == "start"
    assert view.assignments[WORKER, ModelName("small")].assigned_unix_s == NOW


async def test_a_term_says_once_that_its_first_decision_is_made(fleet):
    heard = []

    def noted(*arguments):
        heard.append("decided")
        return decide(*arguments)

    await fleet.scheduler(decide=noted, on_settled=lambda: heard.append("settled"))
    await fleet.cluster.put_demand(demand("small"), lease=fleet.lease)
    await fleet.until(lambda view: view.decisions)
    assert heard[:2] == ["decided", "settled"]
    assert heard.count("settled") == 1


@pytest.fixture
def slow_start_of_small():
    arm_failpoints("scheduler", {RULES_VARIABLE: "scheduler.assign.before[model=small]=delay:1"})
    yield
    arm_failpoints("scheduler", {})


@pytest.mark.usefixtures("slow_start_of_small")
async def test_a_start_does_not_wait_for_the_write_of_the_one_before(fleet):
    decided = TellingDecide()
    await fleet.scheduler(decide=decided)
    await fleet.cluster.put_demand(demand("small"), lease=fleet.lease)
    await decided.to_start.wait()
    await fleet.cluster.put_demand(demand("large"), lease=fleet.lease)
    view = await fleet.until(lambda v: v.assignments)
    assert list(view.assignments) == [(WORKER, "large")]
    view = await fleet.until(lambda v: len(v.assignments) == 2)
    assert view.assignments.keys() == {(WORKER, "large"), (WORKER, "small")}


@pytest.mark.usefixtures("slow_start_of_small")
async def test_a_start_that_is_on_its_way_takes_its_room(fleet):
    await fleet.cluster.put_worker(worker(max_replicas=1), lease=fleet.lease)
    decided = TellingDecide()
    await fleet.scheduler(decide=decided)
    await fleet.cluster.put_demand(demand("small"), lease=fleet.lease)
    await decided.to_start.wait()
    await fleet.cluster.put_demand(demand("large", since=NOW), lease=fleet.lease)
    view = await fleet.until(lambda v: "large" in v.decisions)
    assert view.decisions[ModelName("large")].decision == "wait"
    view = await fleet.until(lambda v: v.assignments)
    assert list(view.assignments) == [(WORKER, "small")]


async def test_two_schedulers_have_one_leader_and_the_other_takes_over(fleet):
    first = await fleet.scheduler("s1")
    await fleet.until(lambda v: v.leader is not None and v.leader.scheduler_id == "s1")
    second = await fleet.scheduler("s2")
    await fleet.until(lambda v: set(v.schedulers) == {"s1", "s2"})
    assert second.fence is None
    await first.stop()
    await fleet.until(lambda v: v.leader is not None and v.leader.scheduler_id == "s2")
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, "small") in v.assignments)
    assert second.fence is not None


async def test_a_deposed_leader_cannot_write_and_campaigns_again(fleet):
    loop = await fleet.scheduler()
    await fleet.cluster.put_demand(demand("large"), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, "large") in v.assignments)
    old = loop.fence
    assert old is not None
    fleet.server.delete("leader")
    await fleet.until(lambda v: v.leader is not None)
    with pytest.raises(Conflict):
        await fleet.cluster.put_assignment(assignment(), fence=old)
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, "small") in v.assignments)


async def test_a_vanished_workers_assignments_are_deleted(fleet):
    await fleet.scheduler()
    lease = await fleet.state.grant_lease(60.0)
    await fleet.cluster.put_worker(worker("worker-b"), lease=lease)
    await fleet.cluster.put_worker(worker(max_replicas=0), lease=fleet.lease)
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: ("worker-b", "small") in v.assignments)
    fleet.links.set_down("worker-b")
    await lease.revoke()
    view = await fleet.until(lambda v: not v.assignments)
    assert view.workers.keys() == {WORKER}


async def test_a_broken_connection_starts_the_model_elsewhere_and_deletes_nothing(fleet):
    await fleet.scheduler()
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, "small") in v.assignments)
    await fleet.cluster.put_replica(replica(), lease=fleet.lease)
    await fleet.cluster.put_worker(worker("worker-b"), lease=fleet.lease)
    fleet.links.set_down(WORKER)
    view = await fleet.until(lambda v: ("worker-b", "small") in v.assignments)
    assert view.assignments.keys() == {(WORKER, "small"), ("worker-b", "small")}


async def test_workers_lost_in_an_outage_keep_their_assignments_until_they_are_back(fleet):
    await fleet.scheduler()
    lease = await fleet.state.grant_lease(60.0)
    await fleet.cluster.put_worker(worker("worker-b"), lease=lease)
    await fleet.cluster.put_worker(worker(max_replicas=0), lease=fleet.lease)
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: ("worker-b", "small") in v.assignments)
    await fleet.cluster.delete_demand(ModelName("small"), demand().router_id)
    await lease.revoke()
    fleet.now += LEASE_GRACE_S - 1.0
    # A decision about another model shows that the leader has looked at this view.
    await fleet.cluster.put_demand(demand("large"), lease=fleet.lease)
    view = await fleet.until(lambda v: "large" in v.decisions)
    assert ("worker-b", "small") in view.assignments
    assert "worker-b" in fleet.links.followed
    again = await fleet.state.grant_lease(60.0)
    await fleet.cluster.put_worker(worker("worker-b"), lease=again)
    await fleet.until(lambda v: ("worker-b", "large") in v.assignments)
    fleet.now += LEASE_GRACE_S
    await fleet.cluster.put_model(model("third"))
    await fleet.cluster.put_demand(demand("third"), lease=fleet.lease)
    view = await fleet.until(lambda v: "third" in v.decisions)
    assert ("worker-b", "small") in view.assignments


async def test_a_worker_that_does_not_return_in_time_loses_its_assignments(fleet):
    await fleet.scheduler()
    lease = await fleet.state.grant_lease(60.0)
    await fleet.cluster.put_worker(worker("worker-b"), lease=lease)
    await fleet.cluster.put_worker(worker(max_replicas=0), lease=fleet.lease)
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: ("worker-b", "small") in v.assignments)
    await fleet.cluster.delete_demand(ModelName("small"), demand().router_id)
    await lease.revoke()
    await fleet.cluster.put_demand(demand("large"), lease=fleet.lease)
    await fleet.until(lambda v: "large" in v.decisions)
    fleet.now += LEASE_GRACE_S
    await fleet.cluster.delete_demand(ModelName("large"), demand().router_id)
    await fleet.until(lambda v: not v.assignments)


async def test_a_failing_replica_is_tried_elsewhere_and_explained(fleet):
    loop = await fleet.scheduler()
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, "small") in v.assignments)
    broken = replica(state=ReplicaState.FAILED, idle_since=NOW, error="canary differs", failures=2)
    await fleet.cluster.put_replica(broken, lease=fleet.lease)
    view = await fleet.until(
        lambda v: "small" in v.decisions and v.decisions[ModelName("small")].decision == "wait"
    )
    assert view.decisions[ModelName("small")].rejected == (
        (f"worker {WORKER}", "its replica does not start: canary differs"),
    )
    await fleet.cluster.put_worker(worker("worker-b"), lease=fleet.lease)
    await fleet.until(lambda v: ("worker-b", "small") in v.assignments)
    explained = fleet.service(loop).explain(ModelName("small"))
    assert "canary differs" in {each.reason for each in explained}


async def test_memory_pressure_evicts_the_idle_model(fleet):
    await fleet.cluster.put_worker(worker(memory_bytes=150 * MIB), lease=fleet.lease)
    await fleet.scheduler()
    await fleet.cluster.put_demand(demand("small"), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, "small") in v.assignments)
    await fleet.cluster.put_replica(replica("small", idle_since=NOW), lease=fleet.lease)
    await fleet.cluster.delete_demand(ModelName("small"), demand().router_id)
    await fleet.cluster.put_demand(demand("large", since=NOW), lease=fleet.lease)
    await fleet.until(lambda v: not v.assignments)
    await fleet.cluster.delete_replica(WORKER, ModelName("small"))
    await fleet.until(lambda v: list(v.assignments) == [(WORKER, "large")])


async def test_scales_to_zero_when_the_keep_alive_ends_though_nothing_changes(fleet):
    await fleet.cluster.put_deployment(deployment("small", keep_alive_s=0.05))
    fleet.now = NOW
    await fleet.scheduler()
    await fleet.cluster.put_demand(demand("small"), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, "small") in v.assignments)
    await fleet.cluster.delete_demand(ModelName("small"), demand().router_id)
    await fleet.cluster.put_replica(replica("small", idle_since=NOW), lease=fleet.lease)
    asyncio.get_running_loop().call_later(0.02, setattr, fleet, "now", NOW + 0.05)
    await fleet.until(lambda v: not v.assignments)
    await fleet.until(lambda v: v.decisions[ModelName("small")].decision == "stop")


async def test_learns_from_a_start_and_explains_it(fleet):
    loop = await fleet.scheduler()
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: "small" in v.decisions)
    await fleet.cluster.put_replica(replica(total_s=0.7, idle_since=NOW), lease=fleet.lease)
    await fleet.until(lambda v: v.replicas)
    await fleet.cluster.put_demand(demand("large"), lease=fleet.lease)
    view = await fleet.until(lambda v: (WORKER, "large") in v.assignments)
    assert error_quantile(loop.starts.costs, 0.5) == pytest.approx(
        (1.0 + 10 * MIB / 1e9 - 0.7) / 0.7
    )
    large = view.assignments[WORKER, ModelName("large")]
    assert large.predicted_start_s == pytest.approx(0.7 + 10 * MIB / 1e9)
    explained = fleet.service(loop).explain(ModelName("small"))
    assert {e.decision for e in explained} == {"waits", "start", ReplicaState.READY.value}
    assert {e.measured_s for e in explained if e.decision != "waits"} == {0.7}


async def test_goes_on_when_cluster_state_comes_back(fleet):
    await fleet.scheduler()
    await fleet.until(lambda v: v.leader is not None)
    fleet.server.stop()
    fleet.server.start()
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, "small") in v.assignments)


@pytest.mark.parametrize("point", ["assign.before", "assign.after", "decide.before"])
async def test_a_decision_that_was_not_written_is_made_again(fleet, point):
    arm_failpoints("scheduler", {RULES_VARIABLE: f"scheduler.{point}=fail@1"})
    try:
        await fleet.scheduler()
        await fleet.cluster.put_demand(demand(), lease=fleet.lease)
        await fleet.until(lambda v: (WORKER, "small") in v.assignments)
        # One that is made later shows that the leader went on.
        await fleet.cluster.put_demand(demand("large"), lease=fleet.lease)
        view = await fleet.until(lambda v: "large" in v.decisions)
        assert len(view.assignments) == 2
    finally:
        arm_failpoints("scheduler", {})
