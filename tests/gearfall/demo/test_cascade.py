"""Cascades over recorded answers: what a replay counts and which thresholds are chosen."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.demo.cascade import Record, choose_thresholds, replay


def record(model: str, certainty: list[float], correct: list[int], flops: float) -> Record:
    return Record(
        model=model,
        certainty=np.array(certainty),
        correct=np.array(correct, dtype=bool),
        flops=np.full(len(correct), flops),
    )


SMALL = record("small", [0.9, 0.8, 0.3, 0.2], [1, 0, 1, 0], 1.0)
LARGE = record("large", [0.9, 0.9, 0.9, 0.9], [1, 1, 1, 0], 10.0)


def test_a_replay_counts_every_visited_stage() -> None:
    outcome = replay([SMALL, LARGE], (0.8,), LARGE)
    assert outcome.shares == (0.5, 0.5)
    assert outcome.accuracy == 0.5
    assert outcome.mean_flops == 1.0 + 10.0 * 0.5


def test_certainty_equal_to_the_threshold_is_enough() -> None:
    assert replay([SMALL, LARGE], (0.2,), LARGE).shares == (1.0, 0.0)
    assert replay([SMALL, LARGE], (math.nextafter(0.2, 1.0),), LARGE).shares == (0.75, 0.25)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_shares_sum_to_one_and_a_stricter_stage_costs_more(one: float, two: float) -> None:
    low, high = sorted((one, two))
    lax, strict = (replay([SMALL, LARGE], (t,), LARGE) for t in (low, high))
    assert sum(lax.shares) == pytest.approx(1.0)
    assert lax.mean_flops <= strict.mean_flops


def families(seed: int = 5, count: int = 2000) -> tuple[Record, Record]:
    """A small model whose certainty is its true chance to be right, and a perfect large one."""
    rng = np.random.default_rng(seed)
    certainty = rng.uniform(size=count)
    correct = rng.uniform(size=count) < certainty**0.1
    small = Record("small", certainty, correct, np.ones(count))
    large = Record("large", np.ones(count), np.ones(count, dtype=bool), np.full(count, 10.0))
    return small, large


def test_the_chosen_thresholds_keep_the_bound_and_save_cost() -> None:
    small, large = families()
    thresholds = choose_thresholds([small, large], large, tolerance=0.02)
    assert thresholds is not None
    outcome = replay([small, large], thresholds, large)
    assert outcome.mean_loss == pytest.approx(1.0 - outcome.accuracy)
    assert outcome.mean_loss < outcome.loss_bound(1.645) < outcome.loss_bound(3.0) <= 0.02
    assert 1.0 < outcome.mean_flops < 11.0


def test_a_larger_tolerance_is_cheaper() -> None:
    small, large = families()
    costs = []
    for tolerance in (0.015, 0.03):
        thresholds = choose_thresholds([small, large], large, tolerance=tolerance)
        assert thresholds is not None
        costs.append(replay([small, large], thresholds, large).mean_flops)
    assert costs[0] > costs[1]


def test_no_loss_in_a_few_questions_certifies_nothing() -> None:
    outcome = replay([LARGE], (), LARGE)
    assert outcome.mean_loss == 0.0
    assert outcome.loss_bound(1.645) > 0.3


def test_what_no_threshold_can_promise_is_refused() -> None:
    never_right = record("last", [1.0] * 4, [0, 0, 0, 0], 1.0)
    assert choose_thresholds([SMALL, never_right], LARGE, tolerance=0.01) is None
