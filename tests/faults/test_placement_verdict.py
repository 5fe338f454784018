"""Runs that keep every promise, and one for each way to break one."""

from dataclasses import replace

import pytest

from gearfall.core.generation.history import ProcessHistory, ProcessStarted, Refused, Wrote
from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.records import MoveRecord, ReplicaState, SchedulerRecord
from tests.faults.placement_verdict import StateChange, StateListed, judge_placement
from tests.gearfall.scheduling.clusters import MIB, assignment, demand, deployment, replica, worker

LEADER = SchedulerRecord("s1", "here:1")
ONE = (worker(),)
START = ProcessStarted("scheduler", 1, 0, 0)


def change(revision, kind, record, *, record_id=None, create=0, at=0.0):
    if record_id is None:
        record_id = {
            "workers": lambda: record.worker_id,
            "leader": lambda: "leader",
            "deployments": lambda: record.name,
            "demand": lambda: (record.model, record.router_id),
        }.get(kind, lambda: (record.worker_id, record.model))()
    return StateChange(revision, kind, record_id, record, create, at)


def led(*later, workers=ONE, deployments=()):
    """A run whose leader has fence 2 and two workers' worth of state before it."""
    before = [change(1, "workers", each) for each in workers]
    before += [change(1, "deployments", each) for each in deployments]
    leader = change(2, "leader", LEADER, create=2)
    return [StateListed(1, tuple(before)), leader, *later]


def history(*events):
    return ProcessHistory(START, events)


PAIR = (worker(), worker("worker-b"))


def test_a_start_that_is_served_breaks_nothing():
    verdict = judge_placement(
        led(
            change(3, "demand", demand(), at=10.0),
            change(4, "assignments", assignment()),
            change(5, "replicas", replica(), at=12.5),
            change(6, "demand", None, record_id=("small", "router-a")),
        ),
        [history(Wrote("assignments", "worker-a/small", 2, 4), Refused("decisions", "small", 2))],
    )
    assert verdict.is_sound
    found = (verdict.terms, verdict.assignments, verdict.demands, verdict.refused)
    assert found == (1, 1, 1, 1)
    assert verdict.longest_wait_s == 2.5


def test_one_that_is_gone_with_its_router_is_no_lost_start():
    gone = change(4, "demand", None, record_id=("small", "router-a"))
    assert judge_placement(led(change(3, "demand", demand()), gone)).is_sound


def test_a_replica_may_stand_twice_while_it_moves():
    move = MoveRecord(
        *(WorkerId("worker-a"), ModelName("small"), WorkerId("worker-b"), ModelName("large")),
        *("", 0.0),
    )
    moving = led(
        change(3, "assignments", assignment()),
        change(4, "moves", move),
        change(5, "assignments", assignment(worker_id="worker-b")),
        workers=PAIR,
    )
    assert judge_placement(moving).is_sound
    assert not judge_placement([each for each in moving if each.revision != 4]).is_sound


@pytest.mark.parametrize(
    "forgiven",
    [
        {"struck": frozenset({"worker-a"})},
        {"gone": change(4, "workers", None, record_id="worker-a")},
        {"gone": change(4, "workers", worker(max_replicas=0))},
        {"gone": change(4, "replicas", replica(state=ReplicaState.FAILED, failures=2))},
    ],
    ids=["out of reach", "gone", "draining", "does not start"],
)
def test_a_replica_that_does_not_count_may_be_replaced(forgiven):
    run = led(change(3, "assignments", assignment()), workers=PAIR)
    run += [forgiven["gone"]] if "gone" in forgiven else []
    run.append(change(5, "assignments", assignment(worker_id="worker-b")))
    assert judge_placement(run, struck=forgiven.get("struck", frozenset())).is_sound


def test_a_group_is_one_replica():
    group = (WorkerId("worker-a"), WorkerId("worker-b"))
    both = [replace(assignment(worker_id=name), group=group) for name in group]
    run = led(*(change(3 + n, "assignments", each) for n, each in enumerate(both)), workers=PAIR)
    assert judge_placement(run).is_sound


def test_what_was_listed_anew_is_where_it_goes_on():
    listed = StateListed(9, (change(9, "workers", worker()),))
    run = led(change(3, "assignments", assignment()), listed)
    run += [change(10, "leader", LEADER, create=10), change(11, "assignments", assignment())]
    verdict = judge_placement(run)
    assert verdict.is_sound
    assert verdict.terms == 2


SMALL_WORKER = worker(memory_bytes=150 * MIB)
BREACHES = {
    "while nobody led": [StateListed(1, ()), change(3, "assignments", assignment())],
    "nobody led since": led(
        change(3, "leader", None, record_id="leader"),
        change(4, "decisions", object(), record_id="small"),
    ),
    "twice": led(*(change(n, "assignments", assignment()) for n in (3, 4))),
    "beyond its 1 replicas": led(
        change(3, "assignments", assignment()),
        change(4, "assignments", assignment(worker_id="worker-b")),
        workers=PAIR,
    ),
    "beyond its 2 replicas": led(
        *(change(n, "assignments", assignment(worker_id=f"w{n}")) for n in (3, 4, 5)),
        workers=tuple(worker(f"w{n}") for n in (3, 4, 5)),
        deployments=(deployment("small", max_replicas=2),),
    ),
    "bytes of": led(
        change(3, "replicas", replica("large", state=ReplicaState.DRAINING)),
        change(4, "assignments", assignment()),
        workers=(SMALL_WORKER,),
    ),
    "replica 2 of 1": led(
        change(3, "assignments", assignment("large")),
        change(4, "assignments", assignment()),
        workers=(worker(max_replicas=1),),
    ),
    "nothing serves it": led(change(3, "demand", demand())),
}


@pytest.mark.parametrize("words", BREACHES)
def test_what_is_broken_is_said(words):
    (breach,) = judge_placement(BREACHES[words]).breaches
    assert words.removesuffix(" since") in breach


def test_a_write_under_another_fence_than_the_leaders_is_a_breach():
    run = led(change(3, "assignments", assignment()))
    late = history(Wrote("assignments", "worker-a/small", 1, 3))
    (breach,) = judge_placement(run, [late]).breaches
    assert "was written under {1}, 2 led" in breach
