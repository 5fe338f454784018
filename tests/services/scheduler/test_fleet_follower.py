"""A fleet that is fed change by change is the one made anew from what stands then."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.records import MoveRecord
from gearfall.infra.state.change_feed import Change, Changes
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.snapshot import ClusterSnapshot
from services.scheduler.fleet_follower import FleetFollower
from services.scheduler.reachability import LEASE_GRACE_S
from services.scheduler.start_learning import StartLearning
from tests.gearfall.scheduling.clusters import (
    assignment,
    by_key,
    by_name,
    by_worker,
    demand,
    model,
    replica,
    worker,
)
from tests.services.scheduler.loop_fleet import ScriptedLinks

WORKERS = ("v", "w")


def move(name: str) -> MoveRecord:
    key = WorkerId("v"), ModelName(name)
    return MoveRecord(*key, WorkerId("w"), ModelName("gone"), "", 0.0, 1.0)


RECORDS: dict[tuple[str, Any], Any] = {
    **{("models", name): model(name) for name in ("small", "large")},
    **{("workers", name): worker(name) for name in WORKERS},
    **{("assignments", (name, "small")): assignment(worker_id=name) for name in WORKERS},
    **{("replicas", (name, "small")): replica(worker_id=name, total_s=0.5) for name in WORKERS},
    ("demand", ("small", "router-a")): demand(),
    **{("moves", ("v", name)): move(name) for name in ("small", "gone")},
    ("leader", "leader"): None,
}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["put", "remove"]), st.sampled_from(sorted(RECORDS, key=repr))),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("link"), st.sampled_from([frozenset(), frozenset("v"), frozenset("w")])),
    ),
    max_size=30,
)


def view_of(held: dict[tuple[str, Any], Any]) -> ClusterView:
    tables: dict[str, Any] = {}
    for (kind, record_id), record in held.items():
        tables.setdefault(kind, {})[record_id] = record
    tables.pop("leader", None)
    return ClusterView(**tables)


def follower(links: ScriptedLinks, clock=lambda: 0.0) -> FleetFollower:
    return FleetFollower(links, StartLearning(), clock)


def pictured(each: FleetFollower) -> dict[str, Any]:
    found: ClusterSnapshot = each.fleet.snapshot()
    return {name: getattr(found, name) for name in ClusterSnapshot.__slots__}


def play(
    fed: FleetFollower,
    links: ScriptedLinks,
    steps: list[tuple[str, Any]],
    after_each: Callable[[], None],
) -> ClusterView:
    """Feed it step by step; return what stands in the end."""
    held = dict[tuple[str, Any], Any]()
    fed.take_in(Changes(ClusterView(), (), 0))
    for step, subject in steps:
        if step == "link":
            links.down = set(subject)
            fed.note_link()
            changes: tuple[Change, ...] = ()
        elif step == "put":
            held[subject] = RECORDS[subject]
            changes = (Change(subject[0], subject[1], RECORDS[subject]),)
        elif step == "remove":
            held.pop(subject, None)
            changes = (Change(subject[0], subject[1], None),)
        restart = view_of(held) if step == "restart" else None
        fed.take_in(Changes(restart, () if restart else changes, 0))
        after_each()
    return view_of(held)


@given(STEPS)
def test_what_is_fed_change_by_change_is_what_stands(steps: list[tuple[str, Any]]) -> None:
    links = ScriptedLinks()
    fed = follower(links)
    view = play(fed, links, steps, fed.check)
    anew = follower(links)
    anew.take_in(Changes(view, (), 0))
    assert pictured(fed) == pictured(anew)


@given(STEPS)
def test_who_stood_by_goes_on_as_one_that_begins_with_what_stands(steps) -> None:
    links, starts, policy = ScriptedLinks(), StartLearning(), SchedulerPolicy()
    fed = FleetFollower(links, starts, lambda: 0.0, leads=False)
    view = play(fed, links, steps, lambda: fed.fleet.keep_warm(policy, 0.0))
    assert not links.followed, "only the leader has connections"
    assert starts.costs == StartCosts(), "only the leader learns"
    fed.lead()
    assert fed.take_in(Changes(None, (), 0)), "it has everything to decide"
    assert links.followed == view.workers.keys()
    fed.check()
    anew_starts = StartLearning()
    anew = FleetFollower(links, anew_starts, lambda: 0.0)
    anew.take_in(Changes(view, (), 0))
    assert pictured(fed) == pictured(anew)
    assert set(starts.costs.outcomes) == set(anew_starts.costs.outcomes)
    assert decide(fed.fleet, StartCosts(), policy, 5.0) == decide(
        anew.fleet, StartCosts(), policy, 5.0
    )


def test_only_what_a_decision_depends_on_asks_for_one() -> None:
    fed = follower(ScriptedLinks())
    assert fed.take_in(Changes(ClusterView(), (), 0))
    assert not fed.take_in(Changes(None, (), 1))
    assert not fed.take_in(Changes(None, (Change("decisions", "small", None),), 2))
    assert not fed.take_in(Changes(None, (Change("routers", "r", None),), 3))
    assert fed.take_in(Changes(None, (Change("demand", ("small", "r"), demand()),), 4))
    fed.note_link()
    assert fed.take_in(Changes(None, (), 5))
    assert not fed.take_in(Changes(None, (), 6))


def test_a_worker_that_left_with_assignments_is_awaited_from_its_leaving_on() -> None:
    now, links = [100.0], ScriptedLinks()
    fed = follower(links, lambda: now[0])
    view = ClusterView(
        models=by_name(model()),
        workers=by_worker(worker("v"), worker("w")),
        assignments=by_key(assignment(worker_id="v")),
    )
    fed.take_in(Changes(view, (), 0))
    now[0] = 110.0
    gone = tuple(Change("workers", name, None) for name in WORKERS)
    fed.take_in(Changes(None, gone, 1))
    assert links.followed == {"v"}
    now[0] = 115.0
    fed.take_in(Changes(None, (Change("workers", "w", worker("w")),), 2))
    assert fed.fleet.snapshot().awaited == {"v": 110.0 + LEASE_GRACE_S}
    links.down = {"v"}
    fed.note_link()
    fed.take_in(Changes(None, (), 3))
    assert fed.fleet.snapshot().awaited == {}


def test_a_replica_that_serves_on_after_a_loss_is_assigned_once_its_worker_and_model_are_known():
    now = [100.0]
    fed = follower(ScriptedLinks(), lambda: now[0])
    adrift = replace(replica(worker_id="v"), is_adrift=True)
    fed.take_in(Changes(ClusterView(replicas=by_key(adrift)), (), 0))
    assert (fed.adoptions(), fed.adoption_due_unix_s()) == ((), None)
    fed.take_in(Changes(None, (Change("workers", "v", worker("v")),), 1))
    assert (fed.adoptions(), fed.adoption_due_unix_s()) == ((), 100.0 + LEASE_GRACE_S)
    fed.take_in(Changes(None, (Change("models", "small", model()),), 2))
    (adoption,) = fed.adoptions()
    written = adoption.assignment
    assert (written.worker_id, written.model) == ("v", "small")
    assert written.memory_bytes == adrift.memory_bytes
    fed.take_in(Changes(None, (Change("assignments", ("v", "small"), written),), 3))
    assert (fed.adoptions(), fed.adoption_due_unix_s()) == ((), None)


def test_one_whose_model_nobody_has_is_assigned_in_the_end_to_be_given_back():
    now = [100.0]
    fed = follower(ScriptedLinks(), lambda: now[0])
    adrift = replace(replica(worker_id="v"), is_adrift=True)
    view = ClusterView(workers=by_worker(worker("v")), replicas=by_key(adrift))
    fed.take_in(Changes(view, (), 0))
    now[0] += LEASE_GRACE_S - 0.1
    assert fed.adoptions() == ()
    now[0] += 0.1
    assert len(fed.adoptions()) == 1
    settled = replace(adrift, is_adrift=False)
    fed.take_in(Changes(None, (Change("replicas", ("v", "small"), settled),), 1))
    assert fed.adoptions() == ()
