"""Simulated streams of answers against a promise: no alarm without drift, one with it, and a
threshold that keeps the promise again."""

import random
from collections.abc import Iterator

import pytest

from gearfall.core.gears.drift import Compared
from gearfall.core.gears.gear_plan import Promise
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from services.router.gears.gear_evidence import AGREEMENT, ESCALATION, Finding, GearEvidence

PLANNED = (Stage(ModelName("small"), 0.6), Stage(ModelName("large")))
PROMISE = Promise(0.9, 0.85, 0.05, 2000, 1.0, 1.0, (1.0, 0.3), (0.95,), (1400,))
LIKE_PLANNED, HARDER = 0.0, 0.25


def evidence(thresholds=(0.6,), promise=PROMISE) -> GearEvidence:
    return GearEvidence(promise, PLANNED, thresholds)


def answers(harder: float, seed: int, threshold: float = 0.6) -> Iterator[tuple[float, bool]]:
    """Certainty, and whether the last stage agrees: 30 % go up, 95 % of those accepted agree.

    `harder`: how much more often the last stage disagrees, mostly where the certainty is low.
    """
    draw = random.Random(seed)
    while True:
        certainty = draw.random() ** 0.7
        chance = 0.02 + 0.1 * max(0.0, 0.9 - certainty) + 3 * harder * (1.0 - certainty)
        yield certainty, certainty < threshold or draw.random() >= chance


def compare(of: GearEvidence, harder: float, seed: int, count: int) -> tuple[Finding | None, int]:
    """Feed accepted answers until something is found, or `count` of them."""
    (threshold,) = of.thresholds
    row = (each for each in answers(harder, seed) if each[0] >= threshold)
    for number in range(count):
        found = of.compared(0, Compared(*next(row)))
        if found is not None:
            return found, number + 1
    return None, count


def disagreement(harder: float, threshold: float) -> float:
    row = answers(harder, 99)
    taken = [each for each in (next(row) for _ in range(20_000)) if each[0] >= threshold]
    return sum(not agreed for _, agreed in taken) / max(1, len(taken))


def test_answers_as_planned_raise_no_alarm():
    assert disagreement(LIKE_PLANNED, 0.6) < 0.05
    assert [compare(evidence(), LIKE_PLANNED, seed, 3000)[0] for seed in range(5)] == [None] * 5


@pytest.mark.parametrize("seed", range(5))
def test_less_agreement_is_noticed_and_answered(seed):
    assert disagreement(HARDER, 0.6) > 0.1
    found, compared = compare(evidence(), HARDER, seed, 3000)
    assert found is not None
    assert (found.promise, found.stage) == (AGREEMENT, 0)
    assert compared < 800
    assert "agreed with large, promised were at least 90.6%" in found.reason
    assert found.threshold is not None
    assert 0.6 < found.threshold <= 1.0


def test_raised_step_by_step_the_promise_holds_again():
    thresholds: tuple[float, ...] = (0.6,)
    for step in range(20):
        found, _ = compare(evidence(thresholds), HARDER, 50 + step, 3000)
        if found is None:
            break
        assert found.threshold is not None
        assert found.threshold > thresholds[0]
        thresholds = (found.threshold,)
    assert found is None
    assert disagreement(HARDER, thresholds[0]) < 0.094
    assert thresholds[0] < 0.99, "most of what is certain is still accepted"


def test_an_alarm_is_raised_once():
    held = evidence()
    assert compare(held, HARDER, 1, 3000)[0] is not None
    assert compare(held, HARDER, 2, 1000)[0] is None


@pytest.mark.parametrize(
    ("up", "is_found"), [(0.3, False), (0.28, False), (0.33, False), (0.6, True), (0.05, True)]
)
def test_another_share_that_goes_up_is_noticed_on_both_sides(up, is_found):
    draw, held = random.Random(4), evidence()
    found = [held.decided(0, 0.1 if draw.random() < up else 0.9) for _ in range(3000)]
    alarms = [each for each in found if each is not None]
    assert [each.promise for each in alarms] == [ESCALATION] * is_found
    assert all("promised were 30.0%" in each.reason for each in alarms)
    assert all(each.threshold is None for each in alarms)


def test_nothing_is_promised_about_escalation_with_raised_thresholds():
    held = evidence((0.9,))
    assert not any(held.decided(0, 0.1) for _ in range(2000))
    assert ESCALATION not in held.evidence(0)
    assert compare(held, HARDER, 1, 10)[0] is None


@pytest.mark.parametrize(
    "promise",
    [
        Promise(0.9, 0.85, 0.05, 2000, 1.0, 1.0, (1.0, 0.3)),
        Promise(0.9, 0.85, 0.05, 2000, 1.0, 1.0, (1.0, 0.3), (None,), (0,)),
    ],
)
def test_where_nothing_is_promised_nothing_is_found(promise):
    held = evidence(promise=promise)
    assert compare(held, HARDER, 1, 1000)[0] is None
    assert held.evidence(0).keys() == {ESCALATION}


def test_a_stage_that_nothing_should_reach_is_not_watched():
    stages = (
        Stage(ModelName("small"), 0.0),
        Stage(ModelName("middle"), 0.5),
        Stage(ModelName("l")),
    )
    promise = Promise(0.9, 0.0, 0.1, 100, 1.0, 1.0, (1.0, 0.0, 0.0), (0.9, None), (100, 0))
    held = GearEvidence(promise, stages, (0.0, 0.5))
    assert not any(held.decided(1, 0.1) for _ in range(100))
    assert held.evidence(1) == {}
    assert held.in_words(1) == "middle: nothing is promised"
    assert "promised at least" in held.in_words(0)
