"""Drift: the rate of false alarms that is stated, how soon a real change is noticed, and the rule
that raises a threshold."""

import random
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.gears.drift import (
    MIN_RECENT,
    ODDS,
    Compared,
    bet_ratio,
    cascade_name,
    deployment_of,
    joined,
    seen,
    since_change,
    tightened,
    tolerance,
    watch_share,
)
from gearfall.core.gears.gear_records import DriftAlarm, DriftRecord
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import Stage

SHARES = st.floats(0.001, 0.999)


def until_alarm(share: float, most: float, at: float, seed: int, limit: int) -> int:
    """Answers until the evidence is `at`, or `limit`."""
    draw, watch = random.Random(seed), watch_share(most)
    for count in range(1, limit + 1):
        watch = seen(watch, draw.random() < share)
        if watch.evidence >= at:
            return count
    return limit


@given(SHARES, SHARES, st.sampled_from(ODDS))
def test_a_bet_gains_nothing_while_the_promise_holds(share, most, odds):
    gain = share * bet_ratio(most, odds, True) + (1 - share) * bet_ratio(most, odds, False)
    assert gain <= 1 + 1e-9 if share <= most else gain > 1 - 1e-9


@pytest.mark.parametrize("most", [0.02, 0.1, 0.5])
def test_false_alarms_are_as_seldom_as_stated(most):
    """At the very edge of the promise, where they are most frequent: on average once in `at`."""
    at, rows = 100, 300
    runs = [until_alarm(most, most, at, seed, 50 * at) for seed in range(rows)]
    assert mean(runs) + 2 * stdev(runs) / rows**0.5 >= at


def test_a_row_that_is_as_promised_raises_none_for_long():
    assert until_alarm(0.03, 0.06, 10_000, seed=3, limit=20_000) == 20_000


@pytest.mark.parametrize(("share", "within"), [(0.4, 60), (0.2, 250), (0.12, 1500)])
def test_a_broken_promise_is_noticed(share, within):
    delays = sorted(until_alarm(share, 0.06, 10_000, seed, 10_000) for seed in range(15))
    assert delays[7] <= within


def test_a_change_is_noticed_however_long_all_was_well():
    draw, watch = random.Random(5), watch_share(0.06)
    for _ in range(5000):
        watch = seen(watch, draw.random() < 0.02)
    assert watch.evidence < 1000
    while watch.evidence < 10_000 and watch.answers < 6000:
        watch = seen(watch, draw.random() < 0.4)
    assert watch.answers < 5100
    assert 0 < watch.share < 0.1


@pytest.mark.parametrize("most", [-1.0, 0.0, 1.0, 2.0])
def test_a_promise_at_the_end_of_the_scale_can_be_watched(most):
    watch = watch_share(most)
    for is_yes in (True, False) * 50:
        watch = seen(watch, is_yes)
    assert 0 <= watch.evidence < float("inf")


def test_a_promise_is_as_exact_as_its_queries():
    assert tolerance(0) == 0.1
    assert tolerance(1) == 0.25
    assert tolerance(1000) == pytest.approx(0.0515, abs=1e-4)
    assert tolerance(10**9) == 0.01


ALARMS = st.builds(
    DriftAlarm, st.sampled_from(("agreement", "escalation")), st.integers(0, 1), st.just("why"),
    st.floats(0, 9),
)  # fmt: skip
FINDINGS = st.builds(
    DriftRecord, st.just(DeploymentName("chat")), st.just("a:0.1,b:0.1,c"), st.integers(1, 2),
    st.tuples(SHARES, SHARES), st.integers(0, 3), st.lists(ALARMS, max_size=1).map(tuple),
    st.sampled_from((0.0, 5.0)),
)  # fmt: skip


@given(FINDINGS, FINDINGS, FINDINGS)
def test_findings_come_to_the_same_in_any_order(one, other, third):
    both = joined(one, other)
    assert both == joined(other, one)
    assert joined(both, third) == joined(one, joined(other, third))
    assert joined(both, one) == both
    assert deployment_of(both) == max(deployment_of(one), deployment_of(other))
    for each in (one, other):
        if deployment_of(each) == deployment_of(both):
            assert all(a >= b for a, b in zip(both.thresholds, each.thresholds, strict=True))


def row(*pairs: tuple[float, bool]) -> list[Compared]:
    return [Compared(certainty, agreed) for certainty, agreed in pairs]


def test_the_change_is_found_behind_good_times():
    compared = row(*[(0.9, True)] * 200, *[(0.9, False)] * 25)
    assert len(since_change(compared, 0.05)) == 25
    assert list(since_change(compared[:3], 0.05)) == compared[:3]
    assert not since_change([], 0.05)


def test_the_threshold_goes_where_the_promise_is_kept_again():
    """Wrong below 0.8, right above: a third has to go up."""
    compared = row(
        *((0.6 + n / 100, False) for n in range(10)), *((0.8 + n / 200, True) for n in range(20))
    )
    assert tightened(compared, 0.5, 0.01) == pytest.approx(0.8)


def test_one_step_sends_no_more_than_half_up():
    compared = row(*((0.5 + n / 100, False) for n in range(40)))
    assert tightened(compared, 0.3, 0.05) == pytest.approx(0.7)


def test_answers_of_one_certainty_all_go_up():
    compared = row(*[(0.9, False)] * 20)
    up = tightened(compared, 0.5, 0.05)
    assert up == 0.9, "what is below 0.9 is not trusted any more"
    assert 0.9 < tightened(compared, up, 0.05) <= 0.9 + 1e-9
    assert tightened(row(*[(1.0, False)] * 20), 1.0, 0.05) == 1.0
    assert tightened([], 0.5, 0.05) >= 0.5


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60),
    st.floats(0, 1),
    st.floats(0.01, 0.5),
)
def test_a_threshold_is_never_loosened(pairs, threshold, most):
    compared = row(*(each for each in pairs if each[0] >= threshold))
    up = tightened(compared, threshold, most)
    assert threshold <= up <= 1.0
    recent = since_change(compared, most)
    assert len(recent) >= min(MIN_RECENT, len(compared))
    assert list(recent) == compared[len(compared) - len(recent) :]


def test_stages_that_ask_otherwise_make_another_cascade():
    small, large = ModelName("small"), Stage(ModelName("large"))
    assert cascade_name((Stage(small, 0.6), large)) == "small:0.6,large"
    assert cascade_name((Stage(small, 0.6, SelfConsistency(3)), large)) == "small*3:0.6,large"
