"""The cap on what goes up, in simulated time: the router's rule, asked with what the run taught."""

from dataclasses import replace

import pytest

from gearfall.core.certainty.escalation import AtOverload, Degraded, EscalationPolicy
from gearfall.core.gears.gear_plan import Gear, Promise
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from gearfall.simulation.cascades.answers import END, Answer
from gearfall.simulation.cascades.cascade_outcomes import Arrival
from gearfall.simulation.cascades.cascade_run import run_cascades
from gearfall.simulation.cascades.seats import FixedReplica
from gearfall.simulation.cascades.step_engine import StepSpeed

SMALL, LARGE = ModelName("small"), ModelName("large")
PROMISE = Promise(0.9, 0.0, 0.1, 0, 1.0, 1.0, (1.0, 0.5))
CASCADE = Gear(100.0, (Stage(SMALL, 0.5), Stage(LARGE)), PROMISE)
UNSURE = {SMALL: Answer(10, 5, 0.2, 0.0, 1.0), LARGE: Answer(10, 5, 1.0, 1.0, 10.0)}
SURE = {SMALL: Answer(10, 5, 0.9, 1.0, 1.0), LARGE: Answer(10, 5, 1.0, 1.0, 10.0)}
CAPPED = EscalationPolicy(at_overload=AtOverload.ANSWER, queue_target_s=0.5)


def replicas():
    """The large one takes half a second for each job, one after the other."""
    fast, slow = (StepSpeed(((1, each), (16, each)), each / 10) for each in (0.01, 0.1))
    return [FixedReplica(SMALL, "n", fast, 4), FixedReplica(LARGE, "n", slow, 1)]


def run(queries, per_s, seconds, policy=CAPPED, gear=CASCADE):
    count = round(per_s * seconds)
    arrivals = [Arrival(n / per_s, n % len(queries)) for n in range(count)]
    return run_cascades(replicas(), queries, arrivals, [gear], escalation=policy).answered


def held_back(answered):
    return [each for each in answered if each.degraded is Degraded.OVERLOAD]


def test_nothing_is_held_back_while_the_stage_above_keeps_up():
    answered = run([UNSURE], 1.5, 20.0)
    assert not held_back(answered)
    assert {each.stages for each in answered} == {2}


def test_without_the_policy_a_queue_grows_that_a_cap_keeps_short():
    open_, capped = run([UNSURE], 6.0, 30.0, EscalationPolicy()), run([UNSURE], 6.0, 30.0)
    assert not held_back(open_)
    assert max(each.total_s for each in open_) > 30.0
    late = [each.total_s for each in capped if each.at_s > 15.0]
    assert max(late) < 4.0
    kept = held_back(capped)
    assert {each.stages for each in kept} == {1}
    assert {each.quality for each in kept} == {0.0}
    # The large one still has all that it can do: two a second, of six.
    went_up = [each for each in capped if each.stages == 2]
    assert 1.5 * 30 < len(went_up) < 2.5 * 30


def test_certain_answers_are_never_held_back_and_leave_their_ways_up_to_others():
    """A plan that has half of all go up, at twice the load that the stage above can do."""
    answered = run([SURE, UNSURE], 8.0, 30.0)
    kept = held_back(answered)
    assert kept
    assert {each.quality for each in kept} == {0.0}, "only uncertain ones are"
    went_up = [each for each in answered if each.stages == 2]
    assert 1.5 * 30 < len(went_up) < 2.6 * 30


def test_the_promise_is_the_target_where_none_is_set():
    policy = replace(CAPPED, queue_target_s=0.0)
    strict = replace(CASCADE, promise=replace(PROMISE, p95_s=0.6))
    loose = replace(CASCADE, promise=replace(PROMISE, p95_s=6.0))
    waits = [
        max(each.total_s for each in run([UNSURE], 6.0, 30.0, policy, gear) if each.at_s > 15.0)
        for gear in (strict, loose)
    ]
    assert waits[0] < waits[1]
    none = replace(CASCADE, promise=replace(PROMISE, p95_s=0.0))
    assert not held_back(run([UNSURE], 6.0, 10.0, policy, none)), (
        "nothing says how long is too long"
    )


@pytest.mark.parametrize(("policy", "stages"), [(CAPPED, {1, 2}), (EscalationPolicy(), {2})])
def test_a_draft_that_would_not_go_up_is_finished(policy, stages):
    small = Answer(10, 5, 0.2, 0.0, 15.0, (1, 2, 9, 9, END), (0.4, 0.4, 0.3, 0.2, 0.2))
    large = Answer(10, 5, 1.0, 1.0, 150.0, (1, 2, 3, 4, END))
    answered = run([{SMALL: small, LARGE: large}], 8.0, 20.0, policy)
    assert {each.stages for each in answered} == stages
    for each in held_back(answered):
        assert each.cost == pytest.approx(15.0), "all five of its tokens"
        (only,) = each.times
        assert only.engine_s >= 0.05 - 1e-9
