"""The front against brute force, and against what CascadeServe's authors published."""

import csv
from dataclasses import replace
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.gears.search import evaluate, front
from tests.gearfall.gears.answers import answers, family

HELLASWAG = Path(__file__).parents[4] / "shared/data/hellaswag_llama/hellaswag_1000.csv"


@pytest.fixture(scope="module")
def llama():
    if not HELLASWAG.exists():
        pytest.skip(f"the replay data is not here: {HELLASWAG.name}")
    rows = list(csv.DictReader(HELLASWAG.read_text().splitlines()))
    return [
        answers(
            size,
            [float(row[f"{size}_correct"]) for row in rows],
            [float(row[f"{size}_margin"]) for row in rows],
            cost,
        )
        for size, cost in (("7b", 1.0), ("13b", 1.82))
    ]


@pytest.mark.parametrize(
    ("threshold", "escalated", "quality", "cost"),
    [(0.1, 0.391, 0.569, 1.71162), (0.2, 0.599, 0.578, 2.09018)],
)
def test_published_replays(llama, threshold, escalated, quality, cost):
    found = evaluate(llama, [threshold])
    assert found.reached[1] == pytest.approx(escalated, abs=1e-12)
    assert found.quality == pytest.approx(quality, abs=1e-12)
    assert found.cost == pytest.approx(cost, abs=1e-9)


def test_no_random_threshold_beats_the_front(llama):
    cascades = front(llama)
    random = np.random.default_rng(7)
    for threshold in random.random(500):
        tried = evaluate(llama, [float(threshold)])
        assert any(c.cost <= tried.cost and c.quality >= tried.quality for c in cascades)


def brute_force(models):
    """Every cascade with every threshold that makes a difference, costs rising."""
    models = sorted(models, key=lambda each: (each.cost.mean(), each.model))
    for count in (1, 2, 3):
        for chosen in combinations(models, count):
            for thresholds in product(*(np.unique(each.certainty) for each in chosen[:-1])):
                yield evaluate(chosen, [float(t) for t in thresholds])


_column = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=20, max_size=20)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(_column, _column, st.floats(0.5, 9.0)), min_size=1, max_size=3))
def test_the_front_is_what_trying_everything_finds(columns):
    models = [answers(f"m{n}", *column) for n, column in enumerate(columns)]
    assume(not all(len(np.unique(each.correct)) == 1 for each in models))
    found = front(models)
    everything = list(brute_force(models))
    for each in everything:
        assert any(c.cost <= each.cost + 1e-9 and c.quality >= each.quality - 1e-9 for c in found)
    assert all(a.cost < b.cost and a.quality < b.quality for a, b in pairwise(found))
    points = {(round(each.cost, 9), round(each.quality, 9)) for each in everything}
    assert {(round(each.cost, 9), round(each.quality, 9)) for each in found} <= points


def test_a_coarse_grid_loses_little():
    models = family(2000, seed=3)
    fine, coarse = front(models, grid=2000), front(models, grid=64)
    for each in fine:
        near = max(c.quality for c in coarse if c.cost <= each.cost * 1.02 + 1e-9)
        assert near >= each.quality - 0.01


@pytest.mark.parametrize("stages", [0, 4])
def test_stages_out_of_range(stages):
    with pytest.raises(InvalidRequest, match="1 to 3"):
        front(family(30, seed=1), max_stages=stages)


def test_what_goes_up_early_costs_what_was_spent():
    """The front of cascades whose rejected answers are cut short, against brute force."""
    models = [
        replace(each, cost_up=each.cost * np.random.default_rng(3).uniform(0.2, 1.0, each.count))
        for each in family(20, 4)
    ]
    everything = list(brute_force(models))
    cascades = front(models)
    for tried in everything:
        assert any(
            c.cost <= tried.cost + 1e-9 and c.quality >= tried.quality - 1e-9 for c in cascades
        )
    for found in cascades:
        assert any(
            found.cost == pytest.approx(tried.cost)
            and found.quality == pytest.approx(tried.quality)
            for tried in everything
        )
    pair = [models[0], models[2]]
    whole = evaluate([replace(each, cost_up=None) for each in pair], [0.5])
    spared = (pair[0].cost - pair[0].spent_up)[pair[0].certainty < 0.5].sum() / pair[0].count
    assert evaluate(pair, [0.5]).cost == pytest.approx(whole.cost - spared)


def test_a_model_stands_in_a_cascade_once_and_the_last_is_asked_once():
    plain = family(60, 5)
    several = SelfConsistency(3)
    certain = [
        replace(each, certainty=each.correct, cost=each.cost * 3, several=several) for each in plain
    ]
    cascades = front([*plain, *certain])
    for each in cascades:
        models = [stage.model for stage in each.stages]
        assert len(set(models)) == len(models)
        assert each.stages[-1].self_consistency is None
    # A certainty that knows what is right makes the best cascades, though each answer costs three.
    best = cascades[-1]
    assert best.stages[0].self_consistency == several
    assert best.quality > max(float(each.correct.mean()) for each in plain)
