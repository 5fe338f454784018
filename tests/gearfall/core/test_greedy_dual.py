import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.greedy_dual import ENTRY_BYTES, GreedyDual

LIMIT = 10 * (ENTRY_BYTES + 100)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("put", "get", "discard", "limit")),
        st.integers(0, 12),
        st.integers(0, 3000),
        st.floats(0.0, 1e12),
    ),
    max_size=80,
)


@given(STEPS)
def test_never_above_the_limit_and_the_least_worth_goes(steps):
    kept: GreedyDual[int] = GreedyDual(LIMIT)
    for what, key, size, cost in steps:
        before = {each: kept.worth(each) for each in kept}
        if what == "put":
            was_kept = kept.put(key, bytes(size), cost)
            assert was_kept == (key in set(kept))
            gone = [worth for each, worth in before.items() if each not in set(kept) | {key}]
            left = [kept.worth(each) for each in kept if each != key]
            assert not gone or not left or max(gone) <= min(left)
        elif what == "get":
            content = kept.get(key)
            assert (content is None) == (key not in before)
            assert content is None or kept.worth(key) >= before[key]
        elif what == "discard":
            kept.discard(key)
        else:
            kept.set_limit(size)
            left = [kept.worth(each) for each in kept]
            gone = [worth for each, worth in before.items() if each not in set(kept)]
            assert not gone or not left or max(gone) <= min(left)
        kept.check()


def test_content_comes_back_and_a_new_one_takes_its_place():
    kept: GreedyDual[str] = GreedyDual(LIMIT)
    assert kept.put("a", b"one", 1.0)
    assert kept.put("a", b"two", 1.0)
    assert (kept.get("a"), kept.get("b"), len(kept)) == (b"two", None, 1)
    assert not kept.put("large", bytes(LIMIT), 1e9)
    assert kept.get("large") is None


def test_dear_and_often_used_stay_old_ones_go_in_the_end():
    kept: GreedyDual[object] = GreedyDual(3 * (ENTRY_BYTES + 10))
    kept.put("dear", bytes(10), 1000.0)
    kept.put("used", bytes(10), 1.0)
    kept.put("cheap", bytes(10), 1.0)
    assert kept.get("used") is not None
    kept.put("new", bytes(10), 5.0)
    assert set(kept) == {"dear", "used", "new"}
    for number in range(2000):
        kept.put(number, bytes(10), 5.0)
        kept.get(number)
    assert "dear" not in set(kept)
    assert kept.evictions == 2001


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_stale_ones_are_dropped(wanted):
    kept: GreedyDual[int] = GreedyDual(LIMIT)
    for key in range(6):
        kept.put(key, b"x", 1.0)
    assert kept.discard_where(lambda key: key < wanted) == wanted
    assert set(kept) == set(range(wanted, 6))
    kept.check()


def test_books_do_not_grow_with_uses():
    kept: GreedyDual[int] = GreedyDual(LIMIT)
    kept.put(1, b"x", 1.0)
    for _ in range(10_000):
        kept.get(1)
    assert len(kept._heap) < 200
