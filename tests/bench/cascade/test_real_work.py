"""Which question comes when: the trace's order of lengths, its moments, nothing seen before."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cascade.real_work import (
    Window,
    lines_of,
    profiled_questions,
    unseen_questions,
    window_of,
)
from gearfall.simulation.arrivals import TraceRow

ROWS = [TraceRow(float(n), 100 - n, 1) for n in range(100)]


def test_a_window_begins_at_zero_and_leaves_out_what_is_beyond():
    window = window_of(ROWS, 10.0, 20.0)
    assert [row.at_s for row in window.rows] == [float(n) for n in range(10)]
    assert window.trace_s == 10.0


def test_time_is_squeezed_and_one_in_so_many_is_kept():
    asks = window_of(ROWS, 0.0, 100.0).asks(5.0, 10.0, [1, 2])
    assert [ask.at_s for ask in asks] == [pytest.approx(0.2 * n) for n in range(50)]
    assert window_of(ROWS, 0.0, 100.0).thinned_by(5.0, 10.0) == 2.0


def test_long_requests_get_long_questions():
    asks = window_of(ROWS, 0.0, 100.0).asks(10.0, 10.0, [7, 3, 5, 9])
    # Lengths fall with time: first the longest question, at last the shortest.
    assert [ask.question for ask in asks] == [3] * 25 + [0] * 25 + [2] * 25 + [1] * 25


def test_prompts_of_one_length_that_come_together_get_different_questions():
    rows = tuple(TraceRow(float(n), 10, 1) for n in range(400))
    asks = Window(rows, 400.0).asks(4.0, 100.0, [5] * 40)
    first = [ask.question for ask in asks[:20]]
    assert len(set(first)) > 10
    assert sorted(ask.question for ask in asks) == sorted(list(range(40)) * 10)


@given(
    st.lists(st.tuples(st.floats(0, 99.9), st.integers(0, 50)), min_size=8, max_size=60),
    st.integers(1, 8),
    st.lists(st.integers(1, 20), min_size=1, max_size=30),
)
def test_asks_keep_count_order_and_ranks(rows, count, prompts):
    window = Window(tuple(TraceRow(at_s, p, 1) for at_s, p in sorted(rows)), 100.0)
    asks = window.asks(count / 4.0, 4.0, prompts)
    assert len(asks) == count
    assert all(0.0 <= a.at_s <= b.at_s <= 4.0 for a, b in pairwise([*asks, asks[-1]]))
    kept = [window.rows[int(n * len(rows) / count)].prompt_tokens for n in range(count)]
    by_length = sorted(zip(kept, asks, strict=True), key=lambda pair: pair[0])
    for (short, ask), (long, other) in pairwise(by_length):
        assert short == long or prompts[ask.question] <= prompts[other.question]


def test_nothing_is_asked_that_the_profile_knows():
    known = profiled_questions(200)
    lines = [json.loads(line) for line in lines_of(known).splitlines()]
    asked = {question.prompt for question in unseen_questions(300)}
    assert len(lines) > 150
    assert len(asked) > 250
    assert not asked & {line["prompt"] for line in lines}
    assert profiled_questions(200) == known
