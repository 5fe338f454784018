"""What memory is kept ready: large enough for each model, never more than there is room for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.tiers.spare_plan import choose_spare, plan_spares

SIZES = st.lists(st.integers(1, 100), max_size=5)


@pytest.mark.parametrize(
    ("models", "room_bytes", "planned"),
    [
        ([], 100, ()),
        ([()], 100, ()),
        ([(40,)], 100, (40,)),
        ([(40,), (70,)], 100, (70,)),
        ([(10, 30), (20,)], 100, (30, 10)),
        ([(30, 30), (50,)], 100, (50, 30)),
        ([(30, 30), (50,)], 65, (50, 15)),
        ([(70,)], 65, (65,)),
        ([(70,)], 9, ()),
        ([(70,)], 0, ()),
        ([(70,)], -5, ()),
        ([(9,)], 100, ()),
        ([(30, 9)], 100, (30,)),
    ],
)
def test_table(models, room_bytes, planned):
    assert plan_spares(models, room_bytes, least_bytes=10) == planned


@given(st.lists(SIZES), st.integers(-5, 400), st.integers(1, 20))
def test_what_is_planned_fits_and_serves(models, room_bytes, least_bytes):
    planned = plan_spares(models, room_bytes, least_bytes)
    assert sum(planned) <= max(0, room_bytes)
    assert list(planned) == sorted(planned, reverse=True)
    assert all(size >= least_bytes for size in planned)
    if sum(planned) < room_bytes - least_bytes:
        # Nothing was cut: every partition worth it finds a file of its own that is large enough.
        for sizes in models:
            worth = sorted((size for size in sizes if size >= least_bytes), reverse=True)
            assert all(ours >= theirs for ours, theirs in zip(planned, worth, strict=False))
            assert len(planned) >= len(worth)


@pytest.mark.parametrize(
    ("faulted", "size_bytes", "chosen"),
    [
        ([], 10, None),
        ([(0, 50)], 10, None),
        ([(50, 50), (20, 20)], 10, 1),
        ([(50, 50), (20, 20)], 30, 0),
        ([(50, 50), (20, 20)], 90, 0),
        ([(5, 50), (20, 20)], 30, 1),
    ],
)
def test_the_file_that_saves_most_is_chosen_and_no_larger_one(faulted, size_bytes, chosen):
    assert choose_spare(faulted, size_bytes) == chosen
