"""Arrivals: as many as asked for, as bursty as asked for, the same for the same seed."""

from itertools import pairwise

import numpy as np
import pytest

from gearfall.core.ids import ModelName
from gearfall.simulation.arrivals import (
    Bursts,
    Lengths,
    Load,
    TraceRow,
    bursty_requests,
    gamma_times,
    popularity,
    spread_trace,
)

MODELS = [ModelName(f"m{index}") for index in range(8)]
LENGTHS = Lengths(100, 1.0, 1000)


def load(**fields) -> Load:
    return Load(
        **{"per_s": 2.0, "duration_s": 500.0, "cv": 8.0, **fields}, prompt=LENGTHS, output=LENGTHS
    )


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(cv):
    times = gamma_times(np.random.default_rng(1), per_s=5.0, cv=cv, duration_s=40_000.0)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


@pytest.mark.parametrize("bursts", Bursts)
def test_there_are_as_many_requests_as_asked_for_in_order(bursts):
    for seed in range(5):
        requests = bursty_requests(seed, MODELS, load(bursts=bursts))
        assert len(requests) == 1000
        times = [each.at_s for each in requests]
        assert times == sorted(times)
        assert times[0] >= 0.0
        assert times[-1] <= 500.0 + 1e-9


def test_a_burst_is_of_one_model_or_of_the_whole_fleet():
    def changes(bursts: Bursts) -> int:
        found = [each.stages[0].model for each in bursty_requests(3, MODELS, load(bursts=bursts))]
        return sum(a != b for a, b in pairwise(found))

    assert changes(Bursts.MODEL) < changes(Bursts.FLEET) / 2


def test_lengths_have_their_mean_and_stay_within_bounds():
    drawn = Lengths(200, 0.5, 2000).draw(np.random.default_rng(2), 20_000)
    assert np.mean(drawn) == pytest.approx(200, rel=0.03)
    assert min(drawn) >= 1
    assert max(drawn) <= 2000


def test_popularity_is_zipfs_and_sums_to_one():
    assert popularity(4, 0.0) == pytest.approx([0.25] * 4)
    assert popularity(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])


def test_a_traces_rows_are_given_away_in_runs_and_none_is_lost():
    rows = [TraceRow(float(at), 10 + at, 5) for at in range(400)]
    requests = spread_trace(1, rows, MODELS, burst=10, most_output=3)
    assert [each.stages[0].prompt_tokens for each in requests] == [
        row.prompt_tokens for row in rows
    ]
    assert {each.stages[0].output_tokens for each in requests} == {3}
    found = [each.stages[0].model for each in requests]
    assert 10 < sum(a != b for a, b in pairwise(found)) < 60
    assert requests == spread_trace(1, rows, MODELS, burst=10, most_output=3)
