"""When jobs that wait behind their model's replicas begin, by hand and for any queue."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import JobId
from gearfall.core.records import ReplicaState, RunningJob
from gearfall.core.start_timeline import StartTimeline
from gearfall.scheduling.placement.queue_ahead import SETTLED_S, queue_ahead, up_in_s
from gearfall.scheduling.placement.work_ahead import UNKNOWN_STEP_S
from gearfall.scheduling.snapshot import Hosted, Waiting
from tests.gearfall.scheduling.clusters import assignment, replica

NOW = 1000.0
NEVER = float("inf")


def serving(*tokens_left, worker_id="a", slots=2, ready_at=0.0, prompt_s=0.0, computed=1):
    """A ready replica with jobs that have so many tokens to go, at 0.1 s each."""
    jobs = tuple(
        RunningJob(JobId(f"j{n}"), 10, computed, left + computed)
        for n, left in enumerate(tokens_left)
    )
    record = replace(
        replica(worker_id=worker_id, slots=slots),
        jobs=jobs,
        running_jobs=len(jobs),
        seen_unix_s=NOW,
        step_s=0.1,
        move_s_per_token=prompt_s,
        timeline=StartTimeline(total_s=2.0),
    )
    return Hosted(assignment(worker_id=worker_id, at=ready_at - 2.0), record)


def starting(ready_in_s, *, worker_id="a", slots=2, predicted_s=5.0):
    made = assignment(worker_id=worker_id, at=NOW + ready_in_s - predicted_s)
    record = replica(worker_id=worker_id, slots=slots, state=ReplicaState.LOADING)
    return Hosted(replace(made, predicted_start_s=predicted_s), record)


def jobs(count, *, tokens=20, prompt=0):
    """Waiting jobs, each with so many tokens of prompt and answer."""
    return Waiting(count, NOW, count * (tokens + prompt), prompt_tokens=count * prompt)


@pytest.mark.parametrize(
    ("replicas", "waiting", "last_begins_s"),
    [
        ((), jobs(1), NEVER),
        ((serving(30, 50),), jobs(1), 3.0),
        ((serving(30, 50),), jobs(2), 5.0),
        ((serving(30, 50),), jobs(3), 5.0),
        ((serving(30, 50),), jobs(4), 7.0),
        ((serving(30, 50), serving(10, 10, worker_id="b")), jobs(2), 1.0),
        ((starting(3.0),), jobs(2), 3.0),
        ((starting(3.0),), jobs(3), 3.0 + 20 * UNKNOWN_STEP_S),
        ((serving(30, 50), starting(1.0, worker_id="b", slots=1)), jobs(2), 3.0),
    ],
)
def test_each_takes_the_slot_that_is_free_first(replicas, waiting, last_begins_s):
    assert queue_ahead(replicas, waiting, NOW).last_begins_s == pytest.approx(last_begins_s)


def test_prompts_hold_up_what_runs_beside_them():
    alone = queue_ahead((serving(30, 50, prompt_s=0.01),), jobs(2, prompt=100), NOW)
    assert alone.last_begins_s == pytest.approx(5.0 + 1.0)
    taken = queue_ahead((serving(30, 50, prompt_s=0.01, computed=0),), jobs(1), NOW)
    assert taken.last_begins_s == pytest.approx(3.0 + 2 * 10 * 0.01)


def test_a_free_slot_beside_jobs_that_wait_is_none_but_for_a_moment():
    """A replica without memory for more keys and values has slots, and takes nothing."""
    assert queue_ahead((serving(30, slots=8),), jobs(1), NOW).last_begins_s == pytest.approx(3.0)
    assert queue_ahead((serving(slots=8),), jobs(1), NOW).last_begins_s == NEVER
    fresh = serving(slots=8, ready_at=NOW - SETTLED_S / 2)
    assert queue_ahead((fresh,), jobs(8), NOW).last_begins_s == 0.0


def test_jobs_that_nobody_describes_end_at_no_known_time():
    silent = Hosted(assignment(), replace(replica(), running_jobs=3))
    ahead = queue_ahead((silent,), None, NOW)
    assert ahead.idle_in_s == {silent.key: NEVER}
    assert queue_ahead((silent,), jobs(1), NOW).last_begins_s == NEVER


def test_a_replica_idles_after_what_waits_for_it():
    one, other = serving(30, slots=1), serving(10, worker_id="b", slots=1)
    assert queue_ahead((one, other), None, NOW).idle_in_s == pytest.approx(
        {one.key: 3.0, other.key: 1.0}
    )
    ahead = queue_ahead((one, other), jobs(1), NOW)
    assert ahead.idle_in_s == pytest.approx({one.key: 3.0, other.key: 3.0})
    coming = starting(2.0, slots=1)
    ahead = queue_ahead((coming,), jobs(1), NOW)
    assert ahead.idle_in_s == pytest.approx({coming.key: 2.0 + 20 * UNKNOWN_STEP_S})
    assert queue_ahead((coming,), None, NOW).idle_in_s == pytest.approx({coming.key: 2.0})


def test_a_late_start_is_taken_to_be_late_by_as_much_again():
    assert up_in_s(starting(2.0), NOW) == pytest.approx(2.0)
    assert up_in_s(starting(-3.0), NOW) == pytest.approx(3.0)
    assert up_in_s(serving(1), NOW) == 0.0
    assert up_in_s(Hosted(assignment(), None), NOW) == NEVER


@given(
    left=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    coming_s=st.floats(0.0, 20.0),
    count=st.integers(1, 200),
)
def test_more_that_waits_begins_no_sooner_and_another_replica_helps(left, coming_s, count):
    mine = serving(*left, slots=len(left))
    alone = queue_ahead((mine,), jobs(count), NOW)
    more = queue_ahead((mine,), jobs(count + 1), NOW)
    helped = queue_ahead((mine, starting(coming_s, worker_id="b")), jobs(count), NOW)
    assert more.last_begins_s >= alone.last_begins_s - 1e-6 - 2.0 * (count >= 64)
    assert helped.last_begins_s <= alone.last_begins_s + 1e-6
    assert alone.last_begins_s <= alone.idle_in_s[mine.key]
