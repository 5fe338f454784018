"""Shares of an engine's time: even at every moment, and all of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.batching.time_shares import TimeShares


def test_a_moment_is_shared_by_those_who_run():
    books = TimeShares()
    books.begin("a", 10.0)
    books.begin("b", 12.0)
    assert books.take("a", 14.0) == pytest.approx(2.0 + 1.0)
    books.pause("b", 16.0)
    assert books.take("b", 20.0) == pytest.approx(2.0)
    assert books.take("a", 20.0) == pytest.approx(1.0 + 4.0)
    assert books.busy_s == pytest.approx(10.0)


def test_an_idle_engine_owes_nothing():
    books = TimeShares()
    books.begin("a", 1.0)
    books.drop("a", 2.0)
    books.begin("b", 100.0)
    assert books.take("b", 101.0) == pytest.approx(1.0)
    assert books.take("a", 101.0) == 0.0
    assert books.busy_s == pytest.approx(2.0)


def test_a_pause_is_kept_until_it_is_told_and_counts_once():
    books = TimeShares()
    books.begin("a", 0.0)
    books.pause("a", 3.0)
    books.pause("a", 4.0)
    books.begin("a", 5.0)
    assert books.take("a", 6.0) == pytest.approx(4.0)
    assert books.take("a", 6.0) == 0.0


@given(
    st.lists(
        st.tuples(
            st.floats(0, 10), st.sampled_from(["begin", "pause", "take", "drop"]), st.integers(0, 4)
        ),
        max_size=60,
    )
)
def test_the_sum_of_what_was_told_is_the_busy_time(events):
    books, now_s, told_s = TimeShares(), 0.0, 0.0
    for pause_s, what, job in events:
        now_s += pause_s
        owed = getattr(books, what)(job, now_s)
        told_s += owed or 0.0
    told_s += sum(books.take(job, now_s) for job in range(5))
    assert told_s + books.dropped_s == pytest.approx(books.busy_s)
