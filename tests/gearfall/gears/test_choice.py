import numpy as np
import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.gears.choice import MAX_PATH, choose, thinned
from gearfall.gears.search import evaluate, front
from tests.gearfall.gears.answers import family


def mixed(count: int, seed: int = 1):
    return np.random.default_rng(seed).permutation(count)


def test_it_is_certified_and_cheaper_than_the_large_model():
    models = family(3000, seed=2)
    chosen = choose(models, 0.7, delta=0.05, order=mixed(3000))
    assert chosen.certificate.bound >= 0.7
    assert chosen.cascade.cost < models[-1].cost.mean()
    assert chosen.certificate.queries == 2100


def test_looser_demands_cost_no_more():
    models = family(3000, seed=2)
    costs = [
        choose(models, target, delta=delta, order=mixed(3000)).cascade.cost
        for target, delta in ((0.75, 0.01), (0.75, 0.2), (0.65, 0.2))
    ]
    assert costs == sorted(costs, reverse=True)


def test_promises_hold_over_the_source_as_often_as_stated():
    """What was chosen on 600 queries, looked at over 60,000 of the same source."""
    everything = family(60_000, seed=4)
    by_name = {each.model: each for each in everything}
    random, broken, delta = np.random.default_rng(6), 0, 0.2
    for _ in range(60):
        rows = random.choice(60_000, 600, replace=False)
        chosen = choose(
            [each.take(rows) for each in everything], 0.7, delta=delta, order=mixed(600), grid=32
        )
        stages = chosen.cascade.stages
        limits = [stage.threshold for stage in stages if stage.threshold is not None]
        broken += evaluate([by_name[stage.model] for stage in stages], limits).quality < 0.7
    assert broken / 60 <= delta + 3 * np.sqrt(delta * (1 - delta) / 60)


def test_judged_answers_are_certified_too():
    chosen = choose(family(3000, seed=2, graded=True), 0.65, delta=0.1, order=mixed(3000))
    assert chosen.certificate.method == "population"


def test_a_target_above_every_model_is_refused():
    with pytest.raises(InvalidRequest, match="can't certify"):
        choose(family(500, seed=2), 0.99, delta=0.05, order=mixed(500))


def test_a_thinned_path_keeps_both_ends():
    cascades = front(family(1000, seed=8))
    path = thinned(cascades, MAX_PATH)
    assert len(path) <= MAX_PATH
    assert (path[0], path[-1]) == (cascades[-1], cascades[0])
    assert thinned(cascades[:3], MAX_PATH) == tuple(reversed(cascades[:3]))
