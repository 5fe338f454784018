"""Decisions give gear plans what they want kept, and nobody else."""

from dataclasses import replace

import pytest

from gearfall.core.generation.job import Priority
from gearfall.core.ids import DeploymentName, JobId, ModelName, RouterId, WorkerId
from gearfall.core.records import DemandRecord, RunningJob
from gearfall.scheduling.actions import Assign, Unassign
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
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
from tests.gearfall.scheduling.plans import NAME, ON_BOTH, ON_TWO, paid, plan, plan_record, vote
from tests.gearfall.scheduling.small_world import POLICY, SmallWorld

SMALL, LARGE, ALONE = map(ModelName, ("small", "large", "alone"))


MODELS = [("models", model(name, nodes=("a", "b"), size_bytes=10 * MIB)) for name in
          ("small", "large", "alone", "other")]  # fmt: skip
NODES = [("nodes", node(name, resident=("small", "large", "alone", "other"))) for name in "ab"]
DEPLOYED = ("deployments", deployment("small", "large", name=NAME, keep_alive_s=5.0))


def hosts(*places: str, memory_bytes=1 << 30, most=4):
    """Workers, each `node/number`."""
    return [
        ("workers", worker(each, node_id=each[0], memory_bytes=memory_bytes, max_replicas=most))
        for each in places
    ]


def world(made, *records, policy=POLICY) -> SmallWorld:
    return SmallWorld(
        *MODELS, *NODES, *records, DEPLOYED, ("gear_plans", plan_record(made)), policy=policy
    )


def places(here: SmallWorld) -> set[str]:
    """What is assigned, as the plan would say it."""
    nodes = {w: each.node_id for w, each in here.records.workers.items()}
    return {f"{nodes[worker_id]}/{name}" for worker_id, name in here.records.assignments}


def ticks(here: SmallWorld, count: int) -> None:
    for _ in range(count):
        here.tick()


def test_a_plan_brings_its_lowest_gear_up_where_it_says():
    here = world(ON_TWO, *hosts("a/1", "b/1"))
    ticks(here, 3)
    assert places(here) == {"a/small", "b/small", "b/large"}
    started = here.starts.copy()
    ticks(here, 60)
    assert places(here) == {"a/small", "b/small", "b/large"}
    assert here.starts == started, "what is kept is not started anew"


def test_a_shift_starts_the_gears_replicas_and_releases_the_others_after_their_keep_alive():
    here = world(ON_TWO, *hosts("a/1", "b/1"))
    ticks(here, 5)
    here.fleet.put("gear_votes", vote(2))
    here.tick()
    assert places(here) == {"a/small", "b/small", "b/large", "a/alone"}
    ticks(here, 20)
    assert places(here) == {"a/alone"}
    here.fleet.put("gear_votes", vote(0))
    ticks(here, 20)
    assert places(here) == {"a/small", "b/small", "b/large"}


def test_a_gear_takes_the_room_of_what_is_idle_and_never_what_another_gear_keeps():
    one = replace(plan(("other",), on=("a/other",), name="one"), name="one")
    records = [("deployments", deployment("other", name="one")), ("gear_plans", plan_record(one))]
    made = plan(("small",), ("alone",), on=("a/small", "a/alone"))
    here = world(made, *hosts("a/1", most=2), *records)
    ticks(here, 5)
    assert places(here) == {"a/small", "a/other"}
    here.fleet.put("gear_votes", vote(1))
    ticks(here, 5)
    assert places(here) == {"a/alone", "a/other"}


def test_a_gear_keeps_every_worker_of_a_group():
    pair = ("deployments", deployment("small", name="pair", accelerators=2))
    here = world(plan(("small",), on=("a/small",)), *hosts("a/1", "a/2", most=1), pair)
    ticks(here, 5)
    held = set(here.records.assignments)
    assert held == {("a/1", SMALL), ("a/2", SMALL)}
    here.ask("other", 5)
    ticks(here, int(POLICY.starvation_s) + 20)
    assert (here.done, set(here.records.assignments)) == (0, held)
    here.fleet.remove("gear_plans", NAME)
    ticks(here, int(POLICY.starvation_s))
    assert here.done == 1, "nobody keeps it any more"


def test_room_made_on_one_node_is_kept_whatever_becomes_of_another():
    """`large` fits nowhere on a; on b batch work leaves for it, which would come back at once."""
    made = plan(("small",), ("large",), on=("a/small", "a/large", "b/large"))
    here = world(made, *hosts("a/1", memory_bytes=150 * MIB), *hosts("b/1", most=1))
    large = ("models", model("large", nodes=("a", "b"), size_bytes=100 * MIB))
    here.fleet.put(*large)
    here.ask("other", 1000, Priority.BATCH)
    ticks(here, 5)
    assert places(here) == {"a/small", "b/other"}
    here.fleet.put("gear_votes", vote(1))
    ticks(here, 40)
    assert "b/large" in places(here)
    assert here.starts[LARGE] == 1


def test_a_node_that_comes_back_gets_its_places_back():
    made = plan(("small", "large"), on=("a/small", "b/large"), lost="b",
                left=("a/small", "a/large"))  # fmt: skip
    here = world(made, *hosts("a/1", "b/1"))
    ticks(here, 5)
    assert places(here) == {"a/small", "b/large"}
    here.lose_worker(WorkerId("b/1"))
    ticks(here, 5)
    assert places(here) == {"a/small", "a/large"}
    here.fleet.put(*hosts("b/1")[0])
    ticks(here, 30)
    assert places(here) == {"a/small", "b/large"}


def test_who_waits_is_served_where_the_plan_wants_the_model():
    """Node b has the bytes in memory too; without the plan the emptier worker is taken."""
    made = plan(("small",), on=("b/small",))
    here = world(made, *hosts("a/1", "b/1", memory_bytes=2 << 30))
    here.fleet.put("workers", worker("b/1", node_id="b", memory_bytes=1 << 30))
    here.ask("small", 5)
    ticks(here, 6)
    assert here.done == 1
    assert places(here) == {"b/small"}
    assert here.starts == {SMALL: 1}


def test_a_plan_that_counts_starts_scales_to_zero_and_comes_back_where_it_says():
    here = world(paid(plan(("small",), on=("b/small",))), *hosts("a/1", "b/1"))
    ticks(here, 5)
    assert places(here) == set()
    for asked in (1, 2):
        here.ask("small", 5)
        ticks(here, 6)
        assert (here.done, places(here)) == (asked, {"b/small"})
        ticks(here, 30)
        assert places(here) == set()


def test_who_waits_is_served_elsewhere_while_the_plans_node_is_full():
    made = plan(("small",), on=("b/small",))
    only_there = ("models", model("other", nodes=("b",), size_bytes=10 * MIB))
    here = world(made, *hosts("a/1"), *hosts("b/1", most=1), only_there)
    here.fleet.put("nodes", node("a", resident=("small",), dram_bytes=15 * MIB))
    here.fleet.put("workers", worker("a/1", node_id="a", memory_bytes=1 << 30))
    here.fleet.put("nodes", node("b", resident=("small", "other")))
    here.fleet.put("models", replace(only_there[1], size_bytes=16 * MIB))
    here.ask("other", 1000)
    ticks(here, 1)
    assert places(here) == {"b/other"}
    here.ask("small", 5)
    ticks(here, 6)
    assert here.done == 1
    assert places(here) == {"a/small", "b/other"}


def test_who_waits_gets_one_of_the_plans_replicas_and_not_one_more():
    """Node b has the bytes in memory and node a does not: b's only place goes to who waits."""
    here = world(ON_BOTH, *hosts("a/1", "b/1", "b/2"))
    here.fleet.put("nodes", node("a", ssd_bytes_per_s=1e6))
    here.ask("small", 5)
    ticks(here, 6)
    assert sorted(here.starts.elements()) == [SMALL, SMALL]
    assert places(here) == {"a/small", "b/small"}


def taken(*names: str, min_replicas=0, **fields):
    """Each model in the only place of the worker of its number, of a deployment of its own."""
    for number, name in enumerate(names, 1):
        key = {"model_name": name, "worker_id": f"{'ab'[number - 1]}/1"}
        own = deployment(name, name=f"d-{name}", min_replicas=min_replicas)
        yield from (("models", model(name, nodes=("a", "b"))), ("deployments", own))
        yield from (("assignments", assignment(**key)), ("replicas", replica(**key, **fields)))


def fleet_of(made, *records, on_b=("small", "x", "y", "z"), ssd_bytes_per_s=0.0) -> Fleet:
    """One place on each of nodes a and b."""
    fleet = Fleet()
    slow = node("b", resident=on_b, ssd_bytes_per_s=ssd_bytes_per_s)
    nodes = [("nodes", node("a", resident=("small", "x", "y", "z"))), ("nodes", slow)]
    for each in (*MODELS, *nodes, *hosts("a/1", "b/1", most=1), DEPLOYED, *records):
        fleet.put(*each)
    fleet.put("gear_plans", plan_record(made))
    return fleet


def step(fleet: Fleet, at_s: float) -> set[str]:
    """Carry one decision out; return what is assigned."""
    for action in decide(fleet, StartCosts(), SchedulerPolicy(prefetch=None), at_s).actions:
        if isinstance(action, Assign):
            fleet.put("assignments", action.assignment)
        elif isinstance(action, Unassign):
            fleet.remove("assignments", action.key)
    return {f"{worker_id[0]}/{name}" for worker_id, name in fleet.records.assignments}


@pytest.mark.parametrize("free", ["a", "b"])
@pytest.mark.parametrize("waiting", [[], [("demand", demand(since=1000.0))]])
def test_the_first_room_is_taken_on_whichever_node_of_the_plan(free, waiting):
    here = fleet_of(ON_BOTH, *taken("x", "y", min_replicas=1), *waiting)
    assert step(here, 1000.0) == {"a/x", "b/y"}
    gone = {"a": "x", "b": "y"}[free]
    key = (WorkerId(f"{free}/1"), ModelName(gone))
    here.remove("deployments", DeploymentName(f"d-{gone}"))
    here.remove("assignments", key)
    here.remove("replicas", key)
    assert f"{free}/small" in step(here, 1001.0)


def test_room_that_is_made_for_who_waits_is_kept_though_a_plan_would_start_it_elsewhere():
    """On node b its start takes long; room on node a comes at once."""
    waits = ("demand", demand(since=1000.0))
    z = ("models", model("z", nodes=("a", "b")))
    here = fleet_of(ON_BOTH, *taken("x", idle_since=10.0), z, waits, on_b=("x",),
                    ssd_bytes_per_s=1e5)  # fmt: skip
    assert step(here, 1000.0) == set(), "x makes room for it, and has not gone yet"
    here.put("demand", demand("z", since=1000.1))
    step(here, 1000.1)
    here.remove("replicas", (WorkerId("a/1"), ModelName("x")))
    assert "a/small" in step(here, 1000.2)


def test_a_plan_gets_its_replica_while_what_waits_is_served_by_the_one_there():
    jobs = (RunningJob(JobId("j"), 100, 0, 6, Priority.INTERACTIVE),)
    runs = replace(replica("small", "a/1", slots=1), jobs=jobs, seen_unix_s=1000.0, step_s=0.1)
    own = [("assignments", assignment("small", "a/1")), ("replicas", runs)]
    waits = ("demand", replace(demand(since=1000.0), output_tokens=50))
    here = fleet_of(ON_BOTH, *own, waits, on_b=(), ssd_bytes_per_s=1e5)
    assert step(here, 1000.0) == {"a/small", "b/small"}
    here.remove("gear_plans", DeploymentName(NAME))
    here.remove("assignments", (WorkerId("b/1"), SMALL))
    assert step(here, 1000.0) == {"a/small"}, "without a plan nothing else starts"


def test_a_plan_takes_the_room_of_what_is_idle_while_batch_jobs_wait_for_free_room():
    waits = ("demand", replace(demand(since=1000.0), batch_jobs=1))
    here = fleet_of(ON_BOTH, *taken("x", "y", idle_since=990.0), waits)
    assert step(here, 1000.0) == set(), "on both nodes at once"
    assert here.claims.workers_of(SMALL) == {"a/1", "b/1"}


@pytest.mark.parametrize("count", [2, 1024])
def test_a_node_is_asked_for_no_more_than_one_replica_on_each_of_its_workers(count):
    made = plan(("small",), on=(f"a/small/{count}",))
    here = fleet_of(made, *taken("x", min_replicas=1), *hosts("a/2", most=1))
    assert step(here, 1000.0) == {"a/x", "a/small"}
    here.put(*hosts("a/1")[0])
    assert step(here, 1001.0) == {"a/x", "a/small"}
    assert len(here.records.assignments) == 3
    assert not here.blocked, "nothing is missing that the node could have"


def test_a_replica_that_gears_keep_is_no_victim_and_one_beyond_them_is():
    made = plan(("small",), on=("a/small",))
    here = world(made, *hosts("a/1", most=1))
    ticks(here, 5)
    here.ask("other", 5)
    ticks(here, 40)
    assert places(here) == {"a/small"}
    assert here.done == 0
    here.fleet.remove("gear_plans", DeploymentName(NAME))
    ticks(here, 30)
    assert here.done == 1


def test_without_a_plan_nothing_is_kept():
    here = world(ON_TWO, *hosts("a/1", "b/1"))
    ticks(here, 5)
    here.fleet.remove("gear_plans", DeploymentName(NAME))
    ticks(here, 40)
    assert places(here) == set()


def test_the_next_gears_model_takes_free_room_only():
    """Its start takes long: nothing of it is near."""
    far = replace(model("alone", nodes=("a",), size_bytes=400 * MIB), source="/models/x")
    slow = ("nodes", node("a", resident=("small", "other"), on_ssd=("alone",), ssd_bytes_per_s=1e7))
    made = plan(("small",), ("alone",), on=("a/small", "a/alone"))
    policy = replace(POLICY, gear_shift_s=1.0)
    here = world(made, *hosts("a/1", most=2), ("models", far), slow, policy=policy)
    here.ask("other", 3)
    ticks(here, 3)
    assert places(here) == {"a/small", "a/other"}, "full: other is idle, and stays"
    ticks(here, 60)
    assert places(here) == {"a/small", "a/alone"}, "other went by its keep-alive"


def hint(model_name: str, jobs: int = 1) -> DemandRecord:
    return DemandRecord(ModelName(model_name), RouterId("r2"), 0, 0.0, hinted_jobs=jobs)


def test_a_hint_starts_a_model_where_room_is_free():
    here = SmallWorld(*MODELS, *NODES, *hosts("a/1"))
    here.fleet.put("demand", hint("small"))
    ticks(here, 2)
    assert places(here) == {"a/small"}
    here.fleet.remove("demand", ("small", RouterId("r2")))
    ticks(here, 40)
    assert places(here) == set(), "nobody came: it went by its keep-alive"


def test_a_hint_takes_nobodys_room():
    here = SmallWorld(*MODELS, *NODES, *hosts("a/1", most=1))
    here.ask("other", 5)
    ticks(here, 10)
    here.fleet.put("demand", hint("small"))
    ticks(here, 5)
    assert places(here) == {"a/other"}, "idle, and it stays"
