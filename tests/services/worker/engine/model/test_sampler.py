"""A token depends on logits, seed and index alone; its numbers are those of the distribution."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gearfall.core.generation.sampling import SamplingParams
from services.worker.engine.model.sampler import MAX_MARGIN, Draw, choose, sample_rows, uniform

finite = st.floats(-30, 30, width=32)
rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(2, 40)), elements=finite)


def sample(logits, sampling, index):
    """Sample every row, each of which must be sound."""
    sampled = sample_rows(logits, [Draw(sampling, index)] * len(logits))
    assert None not in sampled
    return [row for row in sampled if row is not None]


samplings = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.integers(0, 8),
    seed=st.integers(0, 2**64 - 1),
    top_logprobs=st.integers(0, 4),
)


@given(rows, samplings, st.integers(0, 10_000))
def test_a_row_alone_gives_what_it_gives_in_a_batch(logits, sampling, index):
    draw = Draw(sampling, index)
    before = logits.copy()
    together = sample_rows(logits, [draw] * len(logits))
    assert (logits == before).all()
    for row, sampled in zip(logits, together, strict=True):
        assert sample_rows(row[None].copy(), [draw]) == [sampled]


@given(rows, samplings)
def test_top_k_one_is_greedy(logits, sampling):
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    narrow = SamplingParams(
        max_tokens=1, temperature=1.5, top_k=1, seed=sampling.seed, top_p=sampling.top_p
    )
    one = sample(logits, greedy, 0)
    two = sample(logits, narrow, 0)
    assert [s.token_id for s in one] == [s.token_id for s in two] == logits.argmax(1).tolist()


@given(rows, samplings, st.integers(0, 100))
def test_the_token_is_among_those_kept(logits, sampling, index):
    for row, sampled in zip(logits, sample(logits, sampling, index), strict=True):
        better = int((row > row[sampled.token_id]).sum())
        if sampling.is_greedy:
            assert better == 0
        else:
            assert better < (sampling.top_k or len(row))
            scaled = np.exp((row.astype(np.float64) - row.max()) / sampling.temperature)
            if sampling.top_k:
                scaled = np.sort(scaled)[::-1][: sampling.top_k]
            above = np.sort(scaled)[::-1][:better].sum()
            assert above <= sampling.top_p * scaled.sum() * (1 + 1e-5)


@given(rows)
def test_numbers_are_of_the_unmodified_distribution(logits):
    sampling = SamplingParams(max_tokens=1, temperature=0.3, top_k=2, seed=9, top_logprobs=2)
    for row, sampled in zip(logits, sample(logits, sampling, 3), strict=True):
        wide = row.astype(np.float64)
        own = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        best = np.sort(own)[::-1]
        assert sampled.logprob == pytest.approx(own[sampled.token_id], abs=1e-4)
        assert sampled.margin == pytest.approx(best[0] - best[1], abs=1e-4)
        assert [a.logprob for a in sampled.alternatives] == pytest.approx(best[:2], abs=1e-4)
        assert all(
            own[a.token_id] == pytest.approx(a.logprob, abs=1e-4) for a in sampled.alternatives
        )


def test_the_stream_depends_on_seed_and_index():
    numbers = [uniform(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(50)]
    assert numbers == [uniform(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert all(0.0 <= number < 1.0 for number in numbers)


def test_the_stream_never_changes():
    """A job resumed by another release must draw the same: these values are the contract."""
    assert [uniform(7, index) for index in (0, 1, 5000)] == PINNED


PINNED = [0.8720734548204873, 0.0828426870273763, 0.22753666012285823]


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    draws = 4000
    for temperature, top_p, expected in (
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 1.0, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (1.0, 0.7, [0.625, 0.375, 0, 0]),
    ):
        sampling = SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, seed=11)
        total = float(np.exp((logits - logits.max()) / temperature).sum())
        tokens = [choose(logits, sampling, uniform(11, index), total) for index in range(draws)]
        shares = np.bincount(tokens, minlength=4) / draws
        assert np.abs(shares - expected).max() < 0.03


wide_samplings = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 50, 700, 5000]),
)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    wide_samplings,
    st.floats(0, 1, exclude_max=True),
)
def test_ranking_only_the_likeliest_chooses_as_ranking_all_does(seed, spread, sampling, number):
    """Flat rows and peaked ones, so that the choice lies at any depth."""
    logits = spread * np.random.default_rng(seed).standard_normal(600, dtype=np.float32)
    wide = logits.astype(np.float64)
    order = np.argsort(-wide, kind="stable")[: sampling.top_k or None]
    weights = np.exp((wide[order] - wide.max()) / sampling.temperature)
    mass = np.cumsum(weights)
    kept = int((np.cumsum(weights) - weights < sampling.top_p * mass[-1]).sum())
    place = min(int((mass[:kept] <= number * mass[kept - 1]).sum()), kept - 1)
    total = float(np.exp((wide - wide.max()) / sampling.temperature).sum())
    assert choose(logits, sampling, number, total) == order[place]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_numbers_are_told_apart(bad):
    logits = np.array([[1.0, bad, 0.0], [0.0, 1.0, 2.0]], dtype=np.float32)
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    first, second = sample_rows(logits, [Draw(greedy, 0)] * 2)
    assert first is None
    assert second is not None
    assert second.token_id == 2


def test_a_token_without_rival_has_a_finite_margin():
    logits = np.array([[1.0, -np.inf]], dtype=np.float32)
    (sampled,) = sample_rows(logits, [Draw(SamplingParams(max_tokens=1), 0)])
    assert sampled is not None
    assert sampled.margin == MAX_MARGIN
    assert sampled.logprob == 0.0
