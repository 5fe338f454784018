from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import JobId
from gearfall.core.records import ReplicaRecord, RunningJob
from gearfall.scheduling.placement.work_ahead import (
    idle_in_s,
    moving_s,
    seconds_left,
    tokens_out,
)
from tests.gearfall.scheduling.clusters import replica

NOW = 1000.0


def busy(*jobs: tuple[int, int, int], slots: int = 4, step_s: float = 0.1) -> ReplicaRecord:
    """Jobs as (prompt, produced, most)."""
    running = tuple(RunningJob(JobId(f"j{n}"), *job) for n, job in enumerate(jobs))
    return replace(
        replica(),
        running_jobs=len(running),
        jobs=running,
        slots=slots,
        step_s=step_s,
        seen_unix_s=NOW,
    )


def test_tokens_are_carried_on_to_now():
    record = busy((10, 5, 20))
    assert tokens_out(record.jobs[0], record, NOW + 1.0) == pytest.approx(15)
    assert tokens_out(record.jobs[0], record, NOW + 60.0) == 20
    assert seconds_left(record, NOW + 1.0) == pytest.approx([0.5])


def test_what_is_late_is_late_by_as_much_again():
    record = busy((10, 5, 20))
    assert seconds_left(record, NOW + 1.5) == pytest.approx([0.0])
    assert seconds_left(record, NOW + 1.75) == pytest.approx([0.25])
    assert idle_in_s(record, NOW + 5.5) == pytest.approx(4.0)


def test_when_a_replica_is_idle():
    record = busy((10, 0, 20), (10, 0, 50), slots=2)
    assert idle_in_s(record, NOW) == pytest.approx(5.0)
    assert idle_in_s(busy(), NOW) == 0.0


def test_a_move_costs_by_tokens_with_some_side_by_side():
    record = replace(busy(*[(100, 0, 200)] * 8), move_fixed_s=0.1, move_s_per_token=0.001)
    assert moving_s(record, NOW) == pytest.approx(8 * 0.2 / 4)
    assert moving_s(record, NOW + 1.0) == pytest.approx(8 * 0.21 / 4)


def test_one_long_job_bounds_a_move_from_below():
    record = replace(busy((10_000, 0, 1), (1, 0, 1)), move_fixed_s=0.0, move_s_per_token=0.001)
    assert moving_s(record, NOW) == pytest.approx(10.0)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(9, 99)), max_size=8),
    st.floats(0.0, 100.0),
)
def test_what_is_left_shrinks_with_time_until_it_is_late(jobs, later_s):
    record = busy(*jobs)
    most_s = max(idle_in_s(record, NOW), later_s)
    assert 0.0 <= idle_in_s(record, NOW + later_s) <= most_s + 1e-9
