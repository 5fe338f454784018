"""What is made of measured times."""

import pytest

from gearfall.profiling.speed import line_through, slope_beyond, waking


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(1, 0.5)], (0.5, 0.0)),
        ([(1, 0.5), (3, 0.7)], (0.5, 0.1)),
        ([(1, 1.0), (2, 1.0), (3, 4.0)], (0.5, 1.5)),
        ([(1, 0.9), (5, 0.5)], (0.7, 0.0)),  # batches never make a step shorter
    ],
)
def test_a_line_through_steps(steps, expected):
    assert line_through(steps) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("larger", "expected"),
    [
        ([], 0.4 / 16),
        ([(48, 1.04)], 0.02),
        ([(32, 0.5), (64, 2.1)], 0.05),
        ([(32, 0.3)], 0.0),
    ],
)
def test_the_slope_beyond_the_largest_steps(larger, expected):
    assert slope_beyond((16, 0.4), larger) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("beside_s", "steps", "expected"),
    [
        (0.0, [(1, 0.4), (2, 0.5)], 0.0),  # no stream ran beside it
        (0.1 + 0.2 + 0.5 + 2 * 0.03, [(1, 0.4), (2, 0.5), (4, 0.9)], 0.03),
        (0.1 + 0.2 + 0.4 + 2 * 0.03, [(1, 0.4)], 0.03),
        (0.5, [(1, 0.4), (2, 0.5)], 0.0),
    ],
)
def test_what_a_job_waits_beside_a_stream_and_not_for_its_steps(beside_s, steps, expected):
    assert waking(beside_s, 0.1, steps) == pytest.approx(expected)
