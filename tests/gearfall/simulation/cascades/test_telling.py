"""When held steps are told: by hand, and against the engine's own gathering."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.job import TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from gearfall.simulation.cascades.telling import Telling
from services.worker.engine.batching.gathering import Gathering
from services.worker.engine_link.messages import StepDone, SubmitJob

JOB, EPOCH = JobId("j"), Epoch(1)


@pytest.mark.parametrize(
    ("step_s", "gather_s", "steps"),
    [(0.01, 0.0, 1), (0.03, 0.02, 1), (0.02, 0.02, 1), (0.01, 0.02, 2), (0.001, 0.02, 20)],
)
def test_a_step_is_told_when_the_next_would_end_too_late(step_s, gather_s, steps):
    assert Telling().steps_until(5.0, step_s, gather_s) == steps
    for count in range(1, steps + 1):
        assert Telling().pass_steps(5.0, count, step_s, gather_s) == (count == steps)


def test_what_was_held_before_is_due_sooner():
    telling = Telling()
    assert not telling.pass_steps(0.0, 1, 0.004, 0.02)
    # Held since 0.004: at the end of the second of these a third would end behind 0.024.
    assert telling.steps_until(0.004, 0.008, 0.02) == 2
    telling.tell()
    assert telling.steps_until(0.004, 0.008, 0.02) == 3


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8),
    st.sampled_from([0, 3, 20]),
)
def test_blocks_are_told_as_the_engine_tells_their_steps(blocks, gather_ms):
    """Of `blocks` each has so many steps of so many milliseconds."""
    telling, gathering = Telling(), Gathering()
    gathering.note(SubmitJob(JOB, EPOCH, (1,), (), SamplingParams(10**6), gather_s=gather_ms))
    now_ms = 0
    for steps, step_ms in blocks:
        is_told = telling.pass_steps(now_ms, steps, step_ms, gather_ms)
        for _ in range(steps):
            now_ms += step_ms
            run = TokenRun(JOB, EPOCH, now_ms, (1,), (-1.0,), (1.0,))
            was_told = gathering.add(StepDone((run,), 1, 0, step_ms), now_ms) is not None
        assert is_told == was_told
