"""The front of a partition is where its first unverified chunk begins, whatever the order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.tiers.verified_front import VerifiedFront


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.permutations(range(len(sizes))))
))  # fmt: skip
def test_it_ends_at_the_first_gap(case):
    sizes, order = case
    front = VerifiedFront(sizes)
    seen: set[int] = set()
    for chunk in order:
        before = front.size_bytes
        has_moved = front.add(chunk)
        seen.add(chunk)
        gap = next((place for place in range(len(sizes)) if place not in seen), len(sizes))
        assert front.size_bytes == sum(sizes[:gap])
        assert has_moved == (front.size_bytes > before)
    assert front.size_bytes == sum(sizes)


def test_a_chunk_is_verified_once():
    front = VerifiedFront([4, 4])
    front.add(1)
    with pytest.raises(AssertionError):
        front.add(1)
