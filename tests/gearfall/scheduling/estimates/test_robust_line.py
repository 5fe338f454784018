"""A line of least relative error: as exact for small loads as for large, moved by no outlier."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.scheduling.estimates.robust_line import Line, line_through

MB = 10**6
POINTS = st.lists(
    st.tuples(st.integers(0, 10**6).map(lambda n: n * MB), st.floats(1e-3, 1e4)), max_size=10
)
SIZES = st.lists(st.integers(1, 10**5), min_size=2, max_size=8, unique=True)


def error(line: Line, points) -> float:
    return float(sum(abs(line.at(size) - seconds) / seconds for size, seconds in points))


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ([(100 * MB, 0.3), (200 * MB, 0.5)], Line(0.1, 2e-9)),
        ([(100 * MB, 0.3), (200 * MB, 0.5), (300 * MB, 0.7), (200 * MB, 9.0)], Line(0.1, 2e-9)),
        ([(100 * MB, 0.5), (200 * MB, 0.3)], Line(0.3, 0.0)),  # no load is shorter for more bytes
        ([(100 * MB, 0.1), (200 * MB, 0.4)], Line(0.0, 1e-9)),  # nor takes less than nothing
        ([(100 * MB, 0.1), (100 * MB, 0.2)], None),
        ([(100 * MB, 0.1)], None),
        ([], None),
    ],
)
def test_lines(points, line):
    found = line_through(points)
    if line is None:
        assert found is None
    else:
        assert found is not None
        assert found.fixed_s == pytest.approx(line.fixed_s)
        assert found.s_per_byte == pytest.approx(line.s_per_byte)


@given(POINTS)
def test_no_line_promises_less_than_nothing(points):
    line = line_through(points)
    assert (line is None) == (len({size for size, _ in points}) < 2)
    if line is not None:
        assert line.fixed_s >= 0.0
        assert line.s_per_byte >= 0.0


@given(POINTS, st.floats(0.0, 1e4), st.floats(0.0, 1e-6))
def test_no_other_line_is_nearer_to_the_points(points, fixed_s, s_per_byte):
    line = line_through(points)
    if line is not None:
        other = Line(fixed_s, s_per_byte)
        near = Line(line.fixed_s * 1.01, line.s_per_byte * 0.99)
        least = min(error(other, points), error(near, points))
        assert error(line, points) <= least * (1 + 1e-6) + 1e-6


@given(SIZES, st.floats(0.0, 10.0), st.floats(1e-9, 1e-8), st.floats(1.1, 1e3))
def test_a_few_slow_ones_move_nothing(sizes, fixed_s, s_per_byte, factor):
    """One more of each size that was hit is not enough where two were not."""
    line = Line(fixed_s, s_per_byte)
    exact = [(size * MB, line.at(size * MB)) for size in sizes] * 2
    found = line_through(exact + [(n, factor * t) for n, t in exact[: len(sizes)]])
    assert found is not None
    assert all(found.at(size) == pytest.approx(seconds, rel=1e-6) for size, seconds in exact)


@given(POINTS, st.floats(0.1, 10.0))
def test_seconds_have_no_favourite_unit(points, factor):
    line, scaled = line_through(points), line_through([(n, t * factor) for n, t in points])
    if line is not None and all(seconds * min(factor, 1.0) > 1e-3 for _, seconds in points):
        assert scaled is not None
        stretched = Line(line.fixed_s * factor, line.s_per_byte * factor)
        points = [(n, t * factor) for n, t in points]
        assert error(stretched, points) == pytest.approx(error(scaled, points), abs=1e-6)
