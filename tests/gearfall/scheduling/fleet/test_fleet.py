"""The index is what the records make it, whatever came in whichever order."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.core.ids import ModelName, RouterId
from gearfall.core.records import LoadRecord, MoveRecord, ReplicaState
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.fleet.fleet_records import id_of
from gearfall.scheduling.gear_step import follow_gears
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.scene import Scene
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
from tests.gearfall.scheduling.plans import plan, plan_record, vote

names = st.sampled_from(("m0", "m1", "m2"))
workers = st.sampled_from(("w0", "w1", "w2"))
nodes = st.sampled_from(("n0", "n1"))
sizes = st.integers(1, 900).map(lambda size: size * MIB)
held = st.lists(names, unique=True)

records = st.one_of(
    st.builds(
        lambda name, size, where, source, removing, base: (
            "models",
            replace(
                model(name, size_bytes=size, nodes=where, source=source),
                is_removing=removing,
                base=base if base != name else "",
            ),
        ),
        names,
        sizes,
        st.lists(nodes, unique=True),
        st.sampled_from(("/x", "s3://b/x")),
        st.sampled_from((False, False, False, True)),
        st.sampled_from(("", "", "m0")),
    ),
    st.builds(
        lambda name, resident, on_ssd, speed: (
            "nodes",
            node(name, resident=resident, on_ssd=on_ssd, remote_bytes_per_s=speed),
        ),
        nodes,
        held,
        st.none() | held,
        st.sampled_from((0.0, 1e8)),
    ),
    st.builds(
        lambda name, where, size, most, slots: (
            "workers",
            replace(worker(name, node_id=where, memory_bytes=size, max_replicas=most), slots=slots),
        ),
        workers,
        nodes,
        sizes,
        st.integers(0, 3),
        st.sampled_from((2, 16)),
    ),
    st.builds(
        lambda name, where, at, group: (
            "assignments",
            replace(assignment(name, where, at=at), group=group),
        ),
        names,
        workers,
        st.sampled_from((0.0, 90.0)),
        st.sampled_from(((), (), ("w0", "w1"))),
    ),
    st.builds(
        lambda name, where, state, idle, failures: (
            "replicas",
            replica(name, where, state=state, idle_since=idle, failures=failures),
        ),
        names,
        workers,
        st.sampled_from(ReplicaState),
        st.sampled_from((0.0, 50.0)),
        st.integers(0, 2),
    ),
    st.builds(
        lambda name, jobs, batch: (
            "demand",
            replace(demand(name, jobs=jobs, since=80.0), batch_jobs=min(jobs, batch)),
        ),
        names,
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    st.builds(
        lambda name, least: ("deployments", deployment(name, name=name, min_replicas=least)),
        names,
        st.integers(0, 1),
    ),
    st.builds(
        lambda name, source, target: (
            "moves",
            MoveRecord(source, name, target, ModelName("m2"), "test", 60.0),
        ),
        names,
        workers,
        workers,
    ),
    st.builds(lambda name: ("load", LoadRecord(name, RouterId("r"), 90.0, 5, 50, 20, 1)), names),
    st.builds(
        lambda name, low, high: (
            "gear_plans",
            plan_record(plan((low,), (high,), on=tuple({f"n0/{low}", f"n1/{high}"}), name=name)),
        ),
        names,
        names,
        names,
    ),
    st.builds(lambda name, gear: ("gear_votes", vote(gear, name=name)), names, st.integers(0, 1)),
)
POLICIES = (SchedulerPolicy(), SchedulerPolicy(min_residency_s=20.0))


def follow(fleet: Fleet, policy: SchedulerPolicy, now_unix_s: float) -> None:
    fleet.refresh(policy, now_unix_s)
    if follow_gears(Scene(fleet, StartCosts(), policy, now_unix_s)):
        fleet.refresh(policy, now_unix_s)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(records, st.sampled_from(("put", "put", "put", "remove"))), max_size=30),
    st.lists(workers, unique=True),
    st.sampled_from(POLICIES),
)
def test_the_index_is_what_one_made_anew_would_be(changes, hidden, policy):
    fleet = Fleet()
    for number, ((kind, record), how) in enumerate(changes):
        if how == "put":
            fleet.put(kind, record)
        else:
            fleet.remove(kind, id_of(kind, record))
        if number % 3 == 0:
            follow(fleet, policy, 100.0 + number)
            fleet.check()
    fleet.set_unreachable(hidden)
    follow(fleet, policy, 139.0)
    before = fleet.records.as_snapshot()
    anew = Fleet.of(before)
    follow(anew, policy, 139.0)
    assert fleet.gears == anew.gears
    decide(fleet, StartCosts(), policy, 140.0)
    assert fleet.records.as_snapshot() == before, "a decision changes no record"
    fleet.check()


def test_kinds_that_nothing_is_decided_from_are_ignored():
    fleet = Fleet()
    fleet.put("routers", object())
    fleet.remove("schedulers", "s1")
    fleet.check()


def test_what_is_put_again_unchanged_makes_no_work():
    fleet = Fleet()
    for kind, record in (("nodes", node()), ("workers", worker()), ("models", model())):
        fleet.put(kind, record)
    decide(fleet, StartCosts(), POLICIES[0], 100.0)
    fleet.put("workers", worker())
    fleet.put("models", model())
    assert not fleet.dirty_models
    assert not fleet.dirty_workers


def test_nothing_is_kept_of_nodes_that_are_gone():
    fleet = Fleet()
    for name in ("n0", "n1"):
        fleet.put("nodes", node(name))
        fleet.put("workers", worker(f"of-{name}", node_id=name))
        fleet.remove("nodes", name)
        assert name in fleet.node_touches, "its worker is still there"
        fleet.remove("workers", f"of-{name}")
    assert not fleet.node_touches
