from itertools import pairwise

import numpy as np
import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.gears.rungs import MAX_CASCADES, QualityTarget, find_rungs
from gearfall.gears.search import evaluate
from tests.gearfall.gears.answers import answers, family

COUNT = 4000
MODELS = family(COUNT, seed=2)


def mixed(count=COUNT, seed=1):
    return np.random.default_rng(seed).permutation(count)


def rungs(quality=None, loss=None, delta=0.05, models=MODELS):
    return find_rungs(models, mixed(models[0].count), QualityTarget(quality, loss, delta))


def true_quality(rung, models) -> float:
    by_name = {each.model: each for each in models}
    limits = [each.threshold for each in rung.cascade.stages if each.threshold is not None]
    return evaluate([by_name[each.model] for each in rung.cascade.stages], limits).quality


def test_without_a_target_every_rung_has_a_bound_of_its_own():
    found = rungs()
    assert len(found) > 5
    assert all(0.0 < each.bound < each.cascade.quality for each in found)
    assert all(a.cascade.cost > b.cascade.cost for a, b in pairwise(found))
    assert all(each.loss_bound is None for each in found)


def test_rungs_without_a_target_leave_no_wide_gap_and_no_model_out():
    found = rungs()
    alone = {each.cascade.stages[0].model for each in found if len(each.cascade.stages) == 1}
    assert alone == {each.model for each in MODELS}
    costs = [each.cascade.cost for each in found]
    most = (costs[0] / costs[-1]) ** (2 / (MAX_CASCADES - 1))
    assert max(a / b for a, b in pairwise(costs)) < most


@pytest.mark.parametrize(("quality", "loss"), [(0.7, None), (None, 0.05), (0.7, 0.05)])
def test_with_a_target_only_rungs_that_keep_it_are_there_best_first(quality, loss):
    found = rungs(quality, loss)
    qualities = [each.cascade.quality for each in found]
    assert qualities == sorted(qualities, reverse=True)
    assert len(found) > 1
    assert all((each.bound, each.loss_bound) == (quality or 0.0, loss) for each in found)
    assert min(each.cascade.cost for each in found) < MODELS[-1].cost.mean()


def test_the_best_model_alone_loses_nothing_to_itself():
    found = rungs(loss=0.012)
    assert any([stage.model for stage in each.cascade.stages] == ["m2"] for each in found)


def test_where_the_best_cascade_was_luck_a_warier_one_is_certified():
    """The learning part sees no wrong answer of a small model that is sure of itself; the testing
    part sees many just above the threshold that follows from that, and none further up."""
    random, count = np.random.default_rng(8), 3000
    certainty, learn = random.random(count), np.arange(900)
    right = np.where(certainty > 0.7, 1.0, 0.0)
    right[900:][(certainty[900:] > 0.7) & (certainty[900:] < 0.8)] = 0.0
    models = [
        answers("small", right, certainty, 1.0),
        answers("large", np.ones(count), certainty, 9.0),
    ]
    right[learn[0]] = 0.0  # not one kind of answers only
    found = find_rungs(models, np.arange(count), QualityTarget(None, 0.02, 0.05))
    both = [each.cascade for each in found if len(each.cascade.stages) == 2]
    assert both
    assert all((each.stages[0].threshold or 0.0) > 0.75 for each in both)
    assert min(each.cost for each in both) < 9.0


def test_cascades_that_cost_more_for_nothing_are_left_out():
    found = [each.cascade for each in rungs(loss=0.05) if len(each.cascade.stages) > 1]
    assert all(a.cost > b.cost for a, b in pairwise(found))


def test_models_that_agree_certify_a_loss_where_no_share_can_be():
    """Both targets speak about a point below the large model; only one knows that models agree."""
    random = np.random.default_rng(3)
    right, certainty = (random.random(2000) < 0.9).astype(float), random.random(2000)
    models = [
        answers("small", np.where(certainty > 0.2, right, 0.0), certainty, 1.0),
        answers("large", right, np.ones(2000), 10.0),
    ]
    assert min(each.cascade.cost for each in rungs(loss=0.01, models=models)) < 4.0
    with pytest.raises(InvalidRequest, match="certify a quality of"):
        rungs(quality=float(right.mean()) - 0.01, models=models)


def test_accepted_rungs_keep_the_target_all_together_as_often_as_stated():
    everything = family(60_000, seed=4)
    large = float(everything[-1].correct.mean())
    random, broken, delta = np.random.default_rng(6), 0, 0.2
    for _ in range(40):
        rows = random.choice(60_000, 800, replace=False)
        sample = [each.take(rows) for each in everything]
        found = find_rungs(sample, mixed(800), QualityTarget(None, 0.06, delta))
        broken += any(true_quality(each, everything) < large - 0.06 for each in found)
    assert broken / 40 <= delta + 3 * np.sqrt(delta * (1 - delta) / 40)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (QualityTarget(0.99, None, 0.05), r"certify a quality of 0\.8[0-9]+ at most, not 0.99"),
        (QualityTarget(None, 1e-4, 0.05), r"certify a loss of 0\.00[0-9]+ at least, not 0.0001"),
        (QualityTarget(1.5, None, 0.05), "quality 1.5: between 0 and 1"),
        (QualityTarget(None, -0.1, 0.05), "loss -0.1: between 0 and 1"),
        (QualityTarget(None, None, 0.0), "delta 0: between 0 and 1"),
    ],
)
def test_what_can_not_be_certified_is_refused_with_what_could(target, says):
    with pytest.raises(InvalidRequest, match=says):
        find_rungs(MODELS, mixed(), target)
