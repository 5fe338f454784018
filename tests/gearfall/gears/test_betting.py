import numpy as np
import pytest

from gearfall.gears.betting import loss_bound, loss_p_value, mean_p_value


def pairs(count: int, lost: float, gained: float, seed: int):
    """Quality of a cascade and of its reference, which differ on few queries."""
    drawn = np.random.default_rng(seed).random(count)
    reference = np.where(drawn < gained, 0.0, 1.0)
    quality = np.where((drawn >= gained) & (drawn < gained + lost), 0.0, 1.0)
    return quality, reference


def test_one_bet_by_hand():
    # Level e^-2 and one value: nu = sqrt(2 x 2 / (1 x 0.25)) = 4, held at 0.75 / 0.5.
    assert mean_p_value(np.array([1.0]), 0.5, np.exp(-2)) == pytest.approx(1 / (1 + 1.5 * 0.5))
    assert mean_p_value(np.array([0.0]), 0.5, np.exp(-2)) == 1.0


def test_a_true_hypothesis_is_seldom_rejected():
    level, rejected = 0.1, 0
    for seed in range(400):
        quality, reference = pairs(500, lost=0.04, gained=0.01, seed=seed)
        rejected += loss_p_value(quality, reference, 0.03, level) <= level
    assert rejected / 400 <= level + 3 * np.sqrt(level * (1 - level) / 400)


def test_a_small_loss_is_certified_where_the_range_alone_would_not_do():
    quality, reference = pairs(2000, lost=0.004, gained=0.002, seed=1)
    assert loss_p_value(quality, reference, 0.01, 0.05) <= 0.05
    by_range = np.sqrt(np.log(1 / 0.05) / (2 * 2000)) * 2  # Hoeffding, values from -1 to 1
    assert loss_bound(quality, reference, 0.05) < by_range / 4


def test_the_bound_is_where_the_test_turns():
    quality, reference = pairs(1500, lost=0.02, gained=0.01, seed=2)
    bound = loss_bound(quality, reference, 0.05)
    assert bound > float((reference - quality).mean())
    assert loss_p_value(quality, reference, bound + 1e-6, 0.05) <= 0.05
    assert loss_p_value(quality, reference, bound - 1e-6, 0.05) > 0.05


def test_more_queries_certify_more():
    seen = [pairs(count, 0.01, 0.01, seed=3) for count in (200, 1000, 5000)]
    bounds = [loss_bound(quality, reference, 0.05) for quality, reference in seen]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < 0.02


def test_nothing_seen_certifies_nothing():
    assert loss_bound(np.array([]), np.array([]), 0.05) == pytest.approx(1.0)
