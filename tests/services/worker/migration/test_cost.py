"""The cost model: lines found under noise and outliers, and the faster path chosen."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName
from services.worker.migration.cost import (
    TRIED,
    UNKNOWN_COST,
    Choice,
    DataPath,
    MigrationCosts,
    Sample,
    fit_bent,
    fit_linear,
)

MODEL, OTHER = ModelName("m"), ModelName("n")
TARGET, ELSEWHERE = "10.0.0.2:7000", "10.0.0.3:7000"
TOKENS, KV, KV_STREAM = DataPath
KV_BYTES = 40_000
"""Of one token."""


SIZES = st.lists(st.integers(50, 5000), min_size=8, max_size=20, unique=True)


def moves_of(sizes, seconds_at, fixed, outliers=0) -> list[Sample]:
    """Moves of these sizes, the first few of which took far too long."""
    times = [seconds_at(size) for size in sizes]
    moves = [Sample(size, fixed + s, s) for size, s in zip(sizes, times, strict=True)]
    late = [Sample(each.size, 20 * each.seconds, 20 * each.bulk_s) for each in moves[:outliers]]
    return late + moves[outliers:]


@given(
    slope=st.floats(1e-5, 1e-2),
    fixed=st.floats(0, 0.5),
    sizes=SIZES,
    outliers=st.integers(0, 1),
)
def test_the_line_is_found_though_some_took_far_too_long(slope, fixed, sizes, outliers):
    line = fit_linear(moves_of(sizes, lambda size: slope * size, fixed, outliers))
    if max(sizes) > 2 * min(sizes):
        for size in sizes:
            assert line.at(size) == pytest.approx(slope * size + fixed, rel=0.35)


@given(
    slope=st.floats(1e-5, 1e-2),
    bend=st.floats(0, 1e-6),
    fixed=st.floats(0, 0.5),
    sizes=SIZES,
    size=st.integers(50, 8000),
)
def test_tokens_that_take_longer_in_longer_jobs_are_predicted_at_any_length(
    slope, bend, fixed, sizes, size
):
    def seconds(tokens):
        return slope * tokens + bend * tokens * tokens

    if max(sizes) > 2 * min(sizes):
        line = fit_bent(moves_of(sizes, seconds, fixed), size)
        assert line.at(size) == pytest.approx(seconds(size) + fixed, rel=0.01)


@pytest.mark.parametrize("fit", [fit_linear, lambda moves: fit_bent(moves, 100)])
def test_of_sizes_that_hardly_differ_the_bulk_s_part_grows(fit):
    line = fit([Sample(100.0, 1.0, 0.4), Sample(101.0, 3.0, 2.4), Sample(102.0, 1.02, 0.41)])
    assert line.per_unit_s == pytest.approx(0.41 / 102)
    assert line.fixed_s == pytest.approx(0.6)


def test_neither_part_is_below_zero():
    falling = fit_linear([Sample(100.0, 3.0, 1.0), Sample(1000.0, 1.0, 0.5)])
    assert (falling.per_unit_s, falling.fixed_s) == (0.0, 2.0)
    steep = fit_linear([Sample(100.0, 0.1, 0.08), Sample(1000.0, 3.0, 2.9)])
    assert steep.fixed_s >= 0
    assert steep.per_unit_s > 0


@given(
    moves=st.lists(
        st.builds(
            lambda size, seconds, share: Sample(size, seconds, share * seconds),
            st.floats(1, 1e9),
            st.floats(1e-3, 60),
            st.floats(0, 1),
        ),
        min_size=1,
        max_size=32,
    ),
    size=st.floats(1, 1e9),
)
def test_whatever_was_measured_a_prediction_is_a_time(moves, size):
    for line in (fit_linear(moves), fit_bent(moves, size)):
        assert 0 <= line.at(size) < float("inf")
        assert min(line.per_unit_s, line.fixed_s) >= 0


def choose(costs: MigrationCosts, tokens: int, *, can_kv: bool = True, target=TARGET) -> Choice:
    kv_path = DataPath.KV if can_kv else None
    return costs.choose(MODEL, target, tokens=tokens, kv_bytes=tokens * KV_BYTES, kv_path=kv_path)


def test_each_path_is_tried_until_it_was_measured():
    costs = MigrationCosts()
    ways = []
    for tokens in (100, 1000, 100, 4000, 500, 100, 1000, 100, 100):
        path = choose(costs, tokens).path
        ways.append(path)
        size = tokens * KV_BYTES if path is KV else tokens
        seconds = 0.001 * tokens if path is KV else 0.0015 * tokens
        costs.note(MODEL, TARGET, path, sample(size, seconds))
    assert ways == [KV, KV, KV, KV, TOKENS, TOKENS, KV, TOKENS, KV]
    assert choose(MigrationCosts(), 100, can_kv=False) == Choice(TOKENS, 0.0, 0.0)


def sample(size: float, seconds: float, fixed_s: float = 0.0) -> Sample:
    return Sample(size, seconds, seconds - fixed_s)


def measured() -> MigrationCosts:
    """By tokens 1 ms a token and 10 ms; by KV 200 MB/s and 110 ms: even at 125 tokens."""
    costs = MigrationCosts()
    for tokens in (64, 1024, 4096):
        costs.note(MODEL, TARGET, TOKENS, sample(tokens, 0.001 * tokens + 0.010, 0.010))
        size = tokens * KV_BYTES
        costs.note(MODEL, TARGET, KV, sample(size, size / 200e6 + 0.110, 0.110))
    return costs


@pytest.mark.parametrize(("tokens", "path"), [(50, TOKENS), (110, TOKENS), (140, KV), (4000, KV)])
def test_the_faster_path_is_taken(tokens, path):
    choice = choose(measured(), tokens)
    assert choice.path is path
    assert choice.predicted_s <= choice.other_s
    by_tokens_s = 0.001 * tokens + 0.010
    assert (choice.other_s if path is KV else choice.predicted_s) == pytest.approx(by_tokens_s)


def test_what_is_known_of_other_targets_is_used_but_not_of_other_models():
    costs = measured()
    elsewhere = choose(costs, 1000, target=ELSEWHERE)
    assert elsewhere == choose(costs, 1000)
    assert costs.predict(OTHER, TARGET, TOKENS, 1000) == 0.0


def test_old_migrations_are_forgotten():
    costs = measured()
    for number in range(40):
        costs.note(MODEL, TARGET, TOKENS, sample(100.0 + 10 * number, 2.0, 1.5))
    assert costs.predict(MODEL, TARGET, TOKENS, 200) == pytest.approx(2.0, rel=0.2)


def test_a_stream_is_not_expected_to_be_as_fast_as_the_socket():
    costs = measured()
    for tokens in (64, 1024):
        costs.note(MODEL, ELSEWHERE, KV_STREAM, sample(tokens * KV_BYTES, 0.010 * tokens))
    assert costs.predict(MODEL, TARGET, KV, 4096 * KV_BYTES) < 1.0
    streamed = costs.choose(
        MODEL, ELSEWHERE, tokens=4096, kv_bytes=4096 * KV_BYTES, kv_path=KV_STREAM
    )
    assert streamed.path is KV_STREAM
    assert streamed.predicted_s == pytest.approx(40.96)
    costs.note(MODEL, ELSEWHERE, KV_STREAM, sample(2048 * KV_BYTES, 20.48))
    streamed = costs.choose(
        MODEL, ELSEWHERE, tokens=4096, kv_bytes=4096 * KV_BYTES, kv_path=KV_STREAM
    )
    assert streamed.path is TOKENS
    assert streamed.other_s == pytest.approx(40.96)


def test_tokens_are_not_tried_again_that_were_far_slower():
    costs = MigrationCosts()
    for tokens in (128, 1024, 256):
        costs.note(MODEL, TARGET, KV, sample(tokens * KV_BYTES, 0.1))
    costs.note(MODEL, TARGET, TOKENS, sample(128, 0.15))
    assert choose(costs, 128).path is TOKENS
    costs.note(MODEL, TARGET, TOKENS, sample(128, 0.5))
    assert choose(costs, 128).path is KV


def test_one_slow_move_does_not_keep_jobs_from_the_faster_path():
    costs = MigrationCosts()
    for tokens, seconds in ((128, 9.0), (1024, 0.3), (256, 0.1)):
        costs.note(MODEL, TARGET, KV, sample(tokens * KV_BYTES, seconds))
    for _ in range(TRIED):
        costs.note(MODEL, TARGET, TOKENS, sample(128, 0.4))
    assert [choose(costs, tokens).path for tokens in (128, 1024, 4096)] == [KV, KV, KV]


def test_what_a_move_costs_is_the_line_of_the_path_that_is_faster_for_most():
    costs = measured()
    line = costs.line_of(MODEL, KV_BYTES)
    assert line.at(1024) == pytest.approx(1024 * KV_BYTES / 200e6 + 0.110)
    assert costs.line_of(MODEL, 0).at(1024) == pytest.approx(1.034)
    assert costs.line_of(OTHER, KV_BYTES) == UNKNOWN_COST


def test_one_migration_alone_says_nothing_about_the_cost_of_the_next():
    costs = MigrationCosts()
    costs.note(MODEL, TARGET, KV, sample(1e6, 0.5))
    assert costs.line_of(MODEL, KV_BYTES) == UNKNOWN_COST
    costs.note(MODEL, ELSEWHERE, KV, sample(3e6, 1.1))
    line = costs.line_of(MODEL, KV_BYTES)
    assert line.fixed_s == pytest.approx(0.2)
    assert line.per_unit_s == pytest.approx(0.012)


def test_where_both_paths_are_close_choices_cost_little():
    """Links at which tokens of this model's speed come even with KV at one length or another.

    Each measurement is off by a tenth, and one of twenty by a factor of up to four.
    """
    lost = []
    for seed, link in enumerate((15e6, 20e6, 25e6, 30e6, 35e6) * 3):
        noise, costs = random.Random(seed), MigrationCosts()
        for number in range(60):
            tokens = noise.choice((64, 128, 256, 512, 1024, 2048, 4096)) + noise.randrange(60)
            bulks = {TOKENS: 1.3e-3 * tokens + 0.55e-6 * tokens**2, KV: tokens * KV_BYTES / link}
            path = choose(costs, tokens).path
            if number >= 20:
                lost.append(bulks[path] / min(bulks.values()) - 1.0)
            late = noise.uniform(1, 4) if noise.random() < 0.05 else 1.0
            bulk_s = bulks[path] * late * noise.uniform(0.9, 1.1)
            size = tokens * KV_BYTES if path is KV else tokens
            costs.note(MODEL, TARGET, path, Sample(size, bulk_s + 0.1, bulk_s))
    assert sum(each < 0.1 for each in lost) >= 0.9 * len(lost)
    assert sum(lost) / len(lost) < 0.03
