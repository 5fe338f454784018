"""Who is next where several models wait for somebody to end."""

from gearfall.core.ids import ModelName, WorkerId
from gearfall.scheduling.fleet.lines import Lines

A, B = ModelName("a"), ModelName("b")
X, Y = WorkerId("x"), WorkerId("y")


def test_who_waited_longest_is_first():
    lines = Lines()
    lines.join(A, X, 2.0)
    assert lines.is_first(A, X, 2.0)
    assert lines.is_first(B, X, 1.0)
    assert not lines.is_first(B, X, 2.0), "of equals, who stood there before"
    assert lines.is_first(B, Y, 3.0)


def test_a_model_waits_in_one_line_until_it_leaves():
    lines = Lines()
    lines.join(A, X, 2.0)
    lines.join(A, Y, 2.0)
    assert lines.is_first(B, X, 3.0)
    assert not lines.is_first(B, Y, 3.0)
    lines.leave(A)
    lines.leave(A)
    assert lines.is_first(B, Y, 3.0)
