"""How ranks share a dimension: all of it, nothing twice, KV heads with their query heads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.checkpoint.manifest_split import Section, Split
from gearfall.core.errors import InvalidRequest


@st.composite
def sections(draw: st.DrawFn) -> Section:
    units, members, size = (draw(st.integers(1, n)) for n in (9, 6, 4))
    return Section(units * members * size, units, members)


@given(st.lists(sections(), min_size=1, max_size=3), st.integers(1, 12))
def test_ranks_share_everything_once_or_say_that_they_cannot(drawn: list[Section], ranks: int):
    split = Split(0, tuple(drawn))
    try:
        parts = [split.ranges(rank, ranks) for rank in range(ranks)]
    except InvalidRequest:
        assert any(ranks > section.units for section in drawn)
        return
    elements = sorted(i for part in parts for start, stop in part for i in range(start, stop))
    assert elements == list(range(split.length))


@given(sections(), st.integers(1, 12))
def test_shares_differ_by_one_unit_at_most(section: Section, ranks: int):
    if ranks > section.units:
        return
    places = [section.range_of(rank, ranks) for rank in range(ranks)]
    sizes = [stop - start for start, stop in places]
    assert max(sizes) - min(sizes) <= section.length // section.units


@given(kv_heads=st.integers(1, 8), group=st.integers(1, 8), ranks=st.integers(1, 16))
def test_a_rank_has_the_kv_heads_of_its_query_heads(kv_heads: int, group: int, ranks: int):
    query = Section(kv_heads * group, kv_heads, group)
    key = Section(kv_heads, kv_heads, 0)
    for rank in range(ranks):
        try:
            start, stop = query.range_of(rank, ranks)
        except InvalidRequest:
            continue
        assert {head // group for head in range(start, stop)} <= set(
            range(*key.range_of(rank, ranks))
        )


@pytest.mark.parametrize("ranks", [3, 4, 64])
def test_indivisible_parts_are_not_cut(ranks: int):
    with pytest.raises(InvalidRequest, match="2 indivisible"):
        Section(8, 1, 2).range_of(0, ranks)


def test_neighbours_are_joined_and_nothing_is_empty():
    split = Split(0, (Section(4, 4, 1), Section(6, 6, 1)))
    assert split.ranges(0, 1) == ((0, 10),)
    assert split.ranges(1, 2) == ((2, 4), (7, 10))
    assert split.part_shape((10, 3), 1, 2) == (5, 3)
    assert split.full_shape((5, 3)) == (10, 3)
