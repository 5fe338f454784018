"""p-values against counting and simulation; what is certified holds as often as promised."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import InvalidRequest
from gearfall.gears.certificate import certify, lower_bound, p_value


def outcomes(right: int, count: int):
    return np.array([1.0] * right + [0.0] * (count - right))


@given(st.integers(1, 40), st.data())
def test_the_binomial_tail_by_counting(count, data):
    right = data.draw(st.integers(0, count))
    target = data.draw(st.floats(0.05, 0.95))
    tail = sum(
        comb(count, k) * target**k * (1 - target) ** (count - k) for k in range(right, count + 1)
    )
    assert p_value(outcomes(right, count), target) == pytest.approx(tail, abs=1e-9)


@pytest.mark.parametrize("right_of_all", range(0, 41, 4))
def test_the_next_queries_fail_no_more_often_than_stated(right_of_all):
    """40 answers in random order, 20 seen: whatever number of them is right."""
    random, target, level = np.random.default_rng(5), 0.7, 0.1
    mistakes = 0
    for _ in range(600):
        everything = random.permutation(outcomes(right_of_all, 40))
        seen, coming = everything[:20], everything[20:]
        if coming.mean() < target and p_value(seen, target, horizon=20) <= level:
            mistakes += 1
    assert mistakes / 600 <= level + 3 * np.sqrt(level * (1 - level) / 600)


@given(st.floats(0.05, 0.95), st.integers(5, 200), st.integers(0, 2**32 - 1))
def test_judged_answers_are_never_more_certain_than_their_mean_allows(target, count, seed):
    quality = np.random.default_rng(seed).random(count)
    p = p_value(quality, target)
    assert 0.0 <= p <= 1.0
    if quality.mean() <= target:
        assert p == 1.0


@given(st.integers(0, 60), st.floats(0.01, 0.3), st.sampled_from([0, 30]))
def test_a_bound_is_where_rejection_ends(right, delta, horizon):
    quality = outcomes(right, 60)
    bound = lower_bound(quality, delta, horizon)
    assert bound <= quality.mean() + 1.0 / (horizon or 60)
    assert p_value(quality, max(0.0, bound - 0.05), horizon) <= delta or bound < 0.05


def test_the_sequence_ends_at_the_first_that_is_not_safe():
    path = [outcomes(95, 100), outcomes(92, 100), outcomes(80, 100), outcomes(99, 100)]
    place, certificate = certify(path, 0.85, 0.05)
    assert (place, certificate.tested) == (1, 3)
    assert 0.85 <= certificate.bound <= certificate.observed == 0.92


def test_a_target_out_of_reach_is_refused_with_what_is_within():
    with pytest.raises(InvalidRequest, match=r"certify 0\.8\d+ at most") as refused:
        certify([outcomes(90, 100)], 0.95, 0.05)
    assert "Lower the target" in refused.value.message


@pytest.mark.parametrize(
    ("target", "delta", "says"),
    [
        (0.0, 0.1, "target"),
        (1.0, 0.1, "target"),
        (float("nan"), 0.1, "target"),
        (0.5, 0.0, "delta"),
    ],
)
def test_senseless_demands(target, delta, says):
    with pytest.raises(InvalidRequest, match=says):
        certify([outcomes(50, 60)], target, delta)


def test_no_path_and_judged_answers_with_a_horizon():
    with pytest.raises(InvalidRequest, match="no cascade"):
        certify([], 0.5, 0.1)
    with pytest.raises(InvalidRequest, match="right or wrong"):
        certify([np.full(40, 0.9)], 0.5, 0.1, horizon=10)
