"""Signals on made-up profiles in which it is known what each of them tells."""

from dataclasses import replace

import numpy as np
import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.core.profile import DrawnAnswer, Generation, Profile, ProfiledModel
from gearfall.gears.calibrate import reliability
from gearfall.gears.signals import LOSS, SIGNALS, compare_signals

COUNT = 1200
ORDER = np.random.default_rng(5).permutation(COUNT)


def model(name: str, seed: int, cost: float, skill: float) -> ProfiledModel:
    """Answers of three tokens; the product of their probabilities is the chance to be right."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(COUNT):
        logprobs = tuple(float(-each) for each in random.exponential((1.0 - skill) * 0.8, 3))
        right = float(random.random() < np.exp(sum(logprobs)))
        margins = tuple(float(each) for each in random.exponential(2.0, 3))
        found.append(Generation(right, cost, 10, 3, logprobs, margins))
    return ProfiledModel(name, generations=tuple(found))


SMALL, LARGE = model("small", 1, 1.0, 0.6), model("large", 2, 20.0, 0.97)
PROFILE = Profile(1.0, "FLOP", tuple(f"q{n}" for n in range(COUNT)), (SMALL, LARGE))


def by_signal(profile: Profile, name: str):
    return {each.signal: each for each in compare_signals(profile, ORDER)[name]}


def test_what_knows_the_chance_beats_what_does_not():
    found = by_signal(PROFILE, "small")
    assert {*SIGNALS, "logistic"} == found.keys()  # too few queries for a curve
    whole = found["whole answer"].reliability
    for worse in ("first token", "first token's gap", "median token", "least gap of two"):
        assert found[worse].reliability.auroc < whole.auroc - 0.02
    assert whole.ece < 0.05 < found["first token"].reliability.ece
    assert found["logistic"].reliability.ece < 0.06


def test_a_better_signal_makes_a_cheaper_cascade():
    found = by_signal(PROFILE, "small")
    better, worse = found["whole answer"].cost_share, found["quantile 0.25"].cost_share
    assert better is not None
    assert worse is not None
    assert better < worse
    assert all(each.cost_share is None for each in by_signal(PROFILE, "large").values())


def test_only_queries_that_fitted_nothing_are_compared():
    (report, *_) = compare_signals(PROFILE, ORDER)["small"]
    assert report.reliability.queries == COUNT - int(0.3 * COUNT)
    rows = ORDER[int(0.3 * COUNT) :]
    values = np.array([np.exp(SMALL.generations[at].logprobs[0]) for at in rows])
    right = np.array([SMALL.generations[at].quality for at in rows])
    assert report.reliability == reliability(values, right)


def test_samples_that_agree_pay_for_being_drawn():
    def drawn(cost: float) -> Profile:
        answers = tuple(
            replace(each, answer_key="own", drawn=(one_beside(each.quality, cost),))
            for each in SMALL.generations
        )
        return replace(PROFILE, models=(replace(SMALL, generations=answers), LARGE))

    def one_beside(quality: float, cost: float) -> DrawnAnswer:
        """The same answer beside a right one, another and less probable one beside a wrong one."""
        return DrawnAnswer("own" if quality else "other", quality, cost, 3, 0.0)

    signal = "equal ones of 2 answers"
    free, paid = (by_signal(drawn(cost), "small")[signal] for cost in (0.0, 2.0))
    assert free.reliability.auroc == 1.0
    assert free.cost_share is not None
    assert paid.cost_share is not None
    assert paid.cost_share == pytest.approx(free.cost_share + 2.0 / 20.0)
    dear = by_signal(drawn(30.0), "small")[signal]
    assert dear.cost_share is None  # dearer than asking the large model in the first place
    assert 0.0 < LOSS < 0.05


def test_without_two_kinds_of_answers_there_is_nothing_to_compare():
    answers = tuple(replace(each, quality=1.0) for each in SMALL.generations)
    one_kind = replace(PROFILE, models=(replace(SMALL, generations=answers), LARGE))
    assert compare_signals(one_kind, ORDER).keys() == {"large"}
    with pytest.raises(InvalidRequest, match="no signal to compare"):
        compare_signals(replace(one_kind, models=one_kind.models[:1]), ORDER)
