"""The cost model: lines found under noise and outliers, and the faster path chosen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName
from services.worker.migration.cost import Choice, Line, MigrationCosts, fit_line

MODEL, OTHER = ModelName("m"), ModelName("n")
TARGET = "10.0.0.2:7000"
KV_BYTES = 40_000
"""Of one token."""


@given(
    slope=st.floats(1e-5, 1e-2),
    fixed=st.floats(0, 0.5),
    sizes=st.lists(st.integers(50, 5000), min_size=8, max_size=20, unique=True),
    outliers=st.integers(0, 1),
)
def test_the_line_is_found_though_some_took_far_too_long(slope, fixed, sizes, outliers):
    times = [slope * size + fixed for size in sizes]
    for place in range(outliers):
        times[place] *= 20
    line = fit_line(tuple(zip(map(float, sizes), times, strict=True)))
    if max(sizes) > 2 * min(sizes):
        for size in sizes:
            assert line.at(size) == pytest.approx(slope * size + fixed, rel=0.35)


def test_sizes_that_hardly_differ_are_taken_as_proportional():
    assert fit_line(((100.0, 1.0), (101.0, 3.0), (102.0, 1.02))) == Line(0.01, 0.0)


def test_neither_part_is_below_zero():
    falling = fit_line(((100.0, 3.0), (1000.0, 1.0)))
    assert (falling.per_unit_s, falling.fixed_s) == (0.0, 2.0)
    steep = fit_line(((100.0, 0.1), (1000.0, 3.0)))
    assert steep.fixed_s == 0.0
    assert steep.per_unit_s > 0


def choose(costs: MigrationCosts, tokens: int, *, can_kv: bool = True, target=TARGET) -> Choice:
    return costs.choose(MODEL, target, tokens=tokens, kv_bytes=tokens * KV_BYTES, can_kv=can_kv)


def test_each_path_is_tried_until_it_was_measured():
    costs = MigrationCosts()
    ways = []
    for tokens in (100, 1000, 100, 4000, 500):
        by_kv = choose(costs, tokens).by_kv
        ways.append(by_kv)
        size = tokens * KV_BYTES if by_kv else tokens
        costs.note(MODEL, TARGET, size, 0.001 * tokens, by_kv=by_kv)
    assert ways == [True, True, False, True, False]
    assert choose(MigrationCosts(), 100, can_kv=False) == Choice(False, 0.0, 0.0)


def measured() -> MigrationCosts:
    """By tokens 1 ms a token and 10 ms; by KV 200 MB/s and 110 ms: even at 125 tokens."""
    costs = MigrationCosts()
    for tokens in (64, 1024, 4096):
        costs.note(MODEL, TARGET, tokens, 0.001 * tokens + 0.010, by_kv=False)
        size = tokens * KV_BYTES
        costs.note(MODEL, TARGET, size, size / 200e6 + 0.110, by_kv=True)
    return costs


@pytest.mark.parametrize(
    ("tokens", "by_kv"), [(50, False), (110, False), (140, True), (4000, True)]
)
def test_the_faster_path_is_taken(tokens, by_kv):
    choice = choose(measured(), tokens)
    assert choice.by_kv is by_kv
    assert choice.predicted_s <= choice.other_s
    by_tokens_s = 0.001 * tokens + 0.010
    assert (choice.other_s if by_kv else choice.predicted_s) == pytest.approx(by_tokens_s)


def test_what_is_known_of_other_targets_is_used_but_not_of_other_models():
    costs = measured()
    elsewhere = choose(costs, 1000, target="10.0.0.3:7000")
    assert elsewhere == choose(costs, 1000)
    assert costs.predict(OTHER, TARGET, 1000, by_kv=False) == 0.0


def test_old_migrations_are_forgotten():
    costs = measured()
    for number in range(40):
        costs.note(MODEL, TARGET, 100.0 + 10 * number, 2.0, by_kv=False)
    assert costs.predict(MODEL, TARGET, 200, by_kv=False) == pytest.approx(2.0)
