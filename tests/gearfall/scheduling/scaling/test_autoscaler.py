import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.records import ReplicaState
from gearfall.scheduling.scaling.autoscaler import (
    ModelLimits,
    SchedulerPolicy,
    evictable_at,
    keep_alive_s,
    scale_model,
)
from gearfall.scheduling.scaling.autoscaler_load import ModelLoad
from gearfall.scheduling.snapshot import Hosted, Waiting
from tests.gearfall.scheduling.clusters import assignment, replica

POLICY = SchedulerPolicy(
    keep_alive_s=300.0, min_residency_s=5.0, residency_per_start=10.0, patience_s=20.0
)
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


@pytest.mark.parametrize(
    ("limits", "load", "firm"),
    [
        (LIMITS, ModelLoad(), 0),
        (ModelLimits(2, 3, 60.0), ModelLoad(), 1),
        (replace(LIMITS, target_queued_tokens=50), ModelLoad(), 2),
        (LIMITS, ModelLoad(10.0, 30, 30.0, 30.0, 10.0, 30.0), 2),
        (LIMITS, ModelLoad(10.0, 30, 30.0, 0.0, 10.0, 30.0), 0),  # a burst, which may queue
        (replace(LIMITS, target_jobs=8), ModelLoad(10.0, 30, 30.0, 0.0, 10.0, 30.0), 2),
    ],
)
def test_what_is_firm_is_wanted_though_what_waits_is_served_soon(limits, load, firm):
    waiting = Waiting(100, 0.0, tokens=1000)
    decision = scale_model((hosted(),), waiting, limits, load, policy=POLICY, now_unix_s=10.0)
    assert (decision.missing, decision.firm) == (2, firm)


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


def test_residency_follows_the_way_back_from_memory_and_not_the_disk_it_once_came_from():
    record = replica(idle_since=109.0, total_s=8.0)
    from_disk = replace(record, timeline=replace(record.timeline, ssd_s=7.0, waited_s=0.2))
    at = evictable_at(
        Hosted(assignment(at=100.0), from_disk),
        has_demand=False,
        spare=True,
        wanted_since_unix_s=109.0,
        policy=POLICY,
    )
    # Ready at 108 s; ten times the 0.8 s that neither the disk nor other loads took.
    assert at == pytest.approx(116.0)


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


@pytest.mark.parametrize(
    ("candidate", "has_demand", "spare", "expected"),
    [
        (hosted(idle_since=50.0), False, True, 5.0),
        (hosted(idle_since=50.0), True, True, 160.0),
        (hosted(), True, True, 160.0),
        (hosted(at=200.0, total_s=1.0), True, True, 211.0),
        (hosted(state=ReplicaState.LOADING), True, True, None),
        (hosted(), True, False, None),
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


def busy(worker_id, jobs, **fields):
    """A ready replica that runs `jobs` of its four slots."""
    base = hosted(worker_id, slots=4, **fields)
    return replace(base, replica=replace(base.replica, running_jobs=jobs))


def steady(jobs, *, stable=None, peak=None):
    """A load that has been `jobs` for long, but for what is named."""
    usual = float(jobs if stable is None else stable)
    highest = float(jobs if peak is None else peak)
    return ModelLoad(1000.0, jobs, min(float(jobs), highest), usual, 1000.0, highest, highest)


def at_1000(have, load, limits, waiting=None):
    return scale_model(have, waiting, limits, load, policy=POLICY, now_unix_s=1000.0)


@pytest.mark.parametrize(
    ("load", "limits", "missing"),
    [
        (steady(2), ModelLimits(0, 8, 60.0), 0),  # of four slots 2.8 are the target
        (steady(3), ModelLimits(0, 8, 60.0), 1),
        (steady(3), ModelLimits(0, 1, 60.0), 0),
        (steady(3), ModelLimits(0, 8, 60.0, target_jobs=4), 0),
        (steady(3), ModelLimits(0, 8, 60.0, target_jobs=1), 2),
        (steady(0, stable=6.0), ModelLimits(0, 8, 60.0, target_jobs=1), 0),
        (steady(4, stable=1.5, peak=3.9), ModelLimits(0, 8, 60.0, target_jobs=2), 0),
        (steady(4, stable=1.5, peak=4.0), ModelLimits(0, 8, 60.0, target_jobs=2), 1),
        (steady(9, stable=1.5, peak=9.0), ModelLimits(0, 8, 60.0, target_jobs=2), 4),
        (steady(9, stable=1.5, peak=9.0), ModelLimits(0, 3, 60.0, target_jobs=2), 2),
        (steady(9, stable=6.5, peak=9.0), ModelLimits(0, 8, 60.0, target_jobs=2), 3),
    ],
)
def test_load_adds_replicas_before_anything_waits(load, limits, missing):
    decision = at_1000((busy("a", 1),), load, limits)
    assert (decision.missing, decision.surplus) == (missing, ())


def test_load_alone_starts_no_first_replica():
    assert at_1000((), steady(9), ModelLimits(0, 8, 60.0)).missing == 0


@pytest.mark.parametrize(("tokens", "missing"), [(0, 0), (2000, 0), (2001, 1), (9000, 2)])
def test_no_more_tokens_wait_for_a_replica_than_its_target(tokens, missing):
    limits = ModelLimits(0, 4, 60.0, target_queued_tokens=1000)
    have = (busy("a", 4), starting("b"))
    assert at_1000(have, ModelLoad(), limits, Waiting(1, 990.0, tokens)).missing == missing


@pytest.mark.parametrize(
    ("have", "load", "least", "gone"),
    [
        ((busy("a", 2), busy("b", 1)), steady(3), 0, []),  # one would run over its target
        ((busy("a", 1), busy("b", 1)), steady(2), 0, ["a"]),
        ((busy("a", 2), busy("b", 1)), steady(2), 0, ["b"]),
        ((busy("a", 2), busy("b", 1)), steady(2), 2, []),
        ((busy("a", 2), busy("b", 1)), steady(2, peak=3.0), 0, []),
        ((busy("a", 2), busy("b", 1)), steady(3, peak=2.0, stable=2.0), 0, []),
        ((busy("a", 2), busy("b", 1)), ModelLoad(), 0, []),
        ((busy("a", 2), starting("b")), steady(2), 0, []),
        ((busy("a", 4), busy("b", 3)), steady(2), 0, []),  # a has no room for b's jobs
        ((busy("a", 1), busy("b", 1), busy("c", 0, idle_since=999.0)), steady(2), 0, []),
    ],
)
def test_quiet_gives_back_the_replica_with_the_fewest_jobs(have, load, least, gone):
    decision = at_1000(have, load, ModelLimits(least, 8, 60.0))
    assert [key[0] for key, _ in decision.surplus] == gone


def test_a_young_replica_is_not_given_back_for_quiet():
    have = (busy("a", 2), busy("b", 1, at=980.0, total_s=4.0))
    decision = at_1000(have, steady(2), ModelLimits(0, 8, 60.0))
    assert (decision.surplus, decision.next_due_unix_s) == ((), 1024.0)


def test_quiet_is_looked_at_again_when_the_peak_is_forgotten():
    decision = at_1000((busy("a", 1), busy("b", 1)), steady(2, peak=5.0), ModelLimits(0, 8, 60.0))
    assert (decision.surplus, decision.next_due_unix_s) == ((), 1060.0)


def test_idle_replicas_stay_through_a_panic_and_go_after_it():
    have = tuple(busy(name, 0, idle_since=900.0) for name in "abc")
    limits = ModelLimits(0, 8, 10.0, target_jobs=2)
    burst = ModelLoad(1000.0, 0, 0.0, 0.0, 1000.0, 5.0, 0.0)
    held = at_1000(have, burst, limits)
    assert (held.surplus, held.next_due_unix_s) == ((), 1060.0)
    later = scale_model(have, None, limits, burst, policy=POLICY, now_unix_s=1120.0)
    assert [key[0] for key, _ in later.surplus] == ["a", "b", "c"]


def test_the_usual_load_keeps_an_idle_replica_beyond_its_keep_alive():
    have = (busy("a", 4), busy("b", 0, idle_since=900.0))
    limits = ModelLimits(0, 8, 10.0, target_jobs=2)
    load = ModelLoad(1000.0, 1, 1.0, 3.0, 1000.0, 3.0, 3.0)
    held = at_1000(have, load, limits)
    assert held.surplus == ()
    assert held.next_due_unix_s == pytest.approx(1000.0 + 60.0 * math.log(2.0))
    later = scale_model(have, None, limits, load, policy=POLICY, now_unix_s=held.next_due_unix_s)
    assert [key[0] for key, _ in later.surplus] == ["b"]


@pytest.mark.parametrize(
    ("fields", "expected_s"),
    [
        ({}, 60.0),
        ({"total_s": 0.05}, 30.0),
        ({"total_s": 0.1}, 60.0),
        ({"total_s": 30.0}, 60.0),
    ],
)
def test_what_is_cheap_to_bring_back_goes_early(fields, expected_s):
    assert keep_alive_s(hosted(**fields), LIMITS, POLICY) == pytest.approx(expected_s)


def test_a_first_canary_and_a_queue_are_no_cost_to_come_back():
    known = hosted(total_s=4.0)
    timeline = replace(known.replica.timeline, queued_s=1.0, waited_s=0.5, prepare_s=2.46)
    known = replace(known, replica=replace(known.replica, timeline=timeline))
    assert keep_alive_s(known, LIMITS, POLICY) == pytest.approx(24.0)


_replicas = st.lists(
    st.tuples(
        st.sampled_from([ReplicaState.READY, ReplicaState.LOADING, ReplicaState.FAILED, None]),
        st.integers(0, 4),
        st.floats(0.0, 990.0),
    ),
    max_size=6,
)
_limits = st.builds(
    lambda least, more, keep_s, jobs, tokens: ModelLimits(
        least, least + more, keep_s, jobs, tokens
    ),
    st.integers(0, 3),
    st.integers(0, 5),
    st.floats(0.0, 500.0),
    st.integers(0, 5),
    st.integers(0, 5000),
)
_loads = st.builds(
    lambda jobs, short, stable, peak: ModelLoad(990.0, jobs, short, stable, 970.0, peak, peak),
    st.integers(0, 40),
    st.floats(0.0, 40.0),
    st.floats(0.0, 40.0),
    st.floats(0.0, 40.0),
)


def _made(drawn):
    states = {}
    for place, (state, jobs, idle_since) in enumerate(drawn):
        name = f"w{place}"
        is_idle = state is not ReplicaState.READY or not jobs
        states[name] = (
            starting(name)
            if state is None
            else busy(name, jobs, state=state, idle_since=idle_since + 1.0 if is_idle else 0.0)
        )
    return tuple(states.values())


@given(_replicas, st.none() | st.integers(1, 99), _limits, _loads)
def test_limits_hold_whatever_comes(drawn, jobs, limits, load):
    have = _made(drawn)
    waiting = None if jobs is None else Waiting(jobs, 980.0, 100 * jobs)
    decision = scale_model(have, waiting, limits, load, policy=POLICY, now_unix_s=1000.0)
    gone = [key for key, _ in decision.surplus]
    left = len(have) - len(gone)
    assert len(set(gone)) == len(gone)
    assert set(gone) <= {each.key for each in have}
    assert not (gone and decision.missing)
    assert left >= min(len(have), limits.min_replicas)
    assert len(have) + decision.missing >= limits.min_replicas
    assert decision.missing == 0 or len(have) + decision.missing <= limits.max_replicas
    if waiting is not None:
        assert not gone
        assert have or decision.missing >= 1 or limits.max_replicas == 0
    elif not decision.missing:
        assert left <= max(limits.max_replicas, 0)
    assert decision.next_due_unix_s is None or decision.next_due_unix_s > 1000.0


@given(_replicas, _limits, _loads)
def test_every_idle_replica_beyond_the_least_goes_in_the_end(drawn, limits, load):
    """Without jobs the due times lead to min_replicas in finitely many steps."""
    have = tuple(each for each in _made(drawn) if each.is_idle)
    load = replace(load, jobs=0)
    now_unix_s = 1000.0
    for _ in range(200):
        decision = scale_model(have, None, limits, load, policy=POLICY, now_unix_s=now_unix_s)
        gone = {key for key, _ in decision.surplus}
        have = tuple(each for each in have if each.key not in gone)
        if decision.next_due_unix_s is None and not gone:
            break
        now_unix_s = max(now_unix_s, decision.next_due_unix_s or 0.0)
    assert len(have) <= limits.min_replicas
