"""Cascades in simulated time: latencies by hand, conservation, gears that shift under load."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.gears.gear_plan import Gear, Promise
from gearfall.core.gears.gear_shift import ShiftPolicy
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from gearfall.simulation.cascades.answers import END, Answer
from gearfall.simulation.cascades.cascade_outcomes import Arrival
from gearfall.simulation.cascades.cascade_run import run_cascades
from gearfall.simulation.cascades.seats import FixedReplica
from gearfall.simulation.cascades.step_engine import StepSpeed

SMALL, LARGE = ModelName("small"), ModelName("large")
PROMISE = Promise(0.9, 0.0, 0.1, 0, 1.0, 1.0, (1.0,))
FAST, SLOW = (StepSpeed(((1, each), (16, each)), each / 10) for each in (0.01, 0.1))
SURE = {SMALL: Answer(10, 5, 0.9, 1.0, 1.0), LARGE: Answer(10, 5, 1.0, 1.0, 10.0)}
UNSURE = {SMALL: Answer(10, 5, 0.2, 0.0, 1.0), LARGE: Answer(10, 5, 1.0, 1.0, 10.0)}
CASCADE = Gear(100.0, (Stage(SMALL, 0.5), Stage(LARGE)), PROMISE)
ALONE = Gear(100.0, (Stage(SMALL),), PROMISE)


def replicas(slots=4):
    return [FixedReplica(SMALL, "n", FAST, slots), FixedReplica(LARGE, "n", SLOW, slots)]


def test_a_sure_answer_costs_one_stage():
    (one,) = run_cascades(replicas(), [SURE], [Arrival(1.0, 0)], [CASCADE]).answered
    # 10 prompt tokens, the first token with them, 4 more steps
    assert one.total_s == pytest.approx(0.01 + 4 * 0.01)
    assert one.first_token_s == one.total_s
    assert (one.quality, one.cost, one.stages) == (1.0, 1.0, 1)


def test_a_worker_is_as_slow_as_it_was_at_that_time_and_the_others_are_not():
    both = [FixedReplica(SMALL, name, FAST, 1, worker=name) for name in "ab"]
    coming = [Arrival(at_s, 0) for at_s in (0.0, 0.0, 1.0, 1.0)]
    slow = {"a": ((0.0, 2.0), (0.5, 1.0)), "b": ((1.02, 3.0),)}
    found = run_cascades(both, [SURE], coming, [ALONE], slowness=slow).answered
    # At 1.02 the other worker has three of five steps left.
    took_s = [each.total_s for each in sorted(found, key=lambda each: (each.at_s, each.total_s))]
    assert took_s == pytest.approx([0.05, 0.1, 0.05, 0.02 + 3 * 0.03])


def test_a_slowness_after_the_last_answer_is_no_part_of_the_run():
    one, coming = [FixedReplica(SMALL, "a", FAST, 1, worker="a")], [Arrival(0.0, 0)]
    later = {"a": ((0.0, 1.0), (100.0, 1.0))}
    run = run_cascades(one, [SURE], coming, [ALONE], slowness=later)
    assert run == run_cascades(one, [SURE], coming, [ALONE])
    assert run.busy_share == {"small on a": pytest.approx(1.0)}


def test_an_unsure_answer_goes_up_and_shows_its_first_token_when_it_has_one():
    (one,) = run_cascades(replicas(), [UNSURE], [Arrival(0.0, 0)], [CASCADE]).answered
    first_stage_s = 0.01 + 4 * 0.01
    assert one.total_s == pytest.approx(first_stage_s + 0.1 + 4 * 0.1)
    assert one.first_token_s == pytest.approx(first_stage_s + 0.1)
    assert (one.quality, one.cost, one.stages) == (1.0, 11.0, 2)


@pytest.mark.parametrize(
    ("draft", "steps", "wrong"),
    [((1, 2, 3, 4, END), 1, 0), ((1, 2, 9), 3, 1), ((9, 2, 3, 4, END), 5, 5), ((), 5, 0)],
)
def test_a_draft_that_is_right_saves_steps_and_one_that_is_wrong_costs(draft, steps, wrong):
    """The first stage gives `draft`; its cost does not depend on how long that is."""
    small = Answer(10, max(1, len(draft)), 0.2, 0.0, 1.0, draft)
    large = Answer(10, 5, 1.0, 1.0, 15.0, (1, 2, 3, 4, END))
    query = {SMALL: small, LARGE: large}
    (one,) = run_cascades(replicas(), [query], [Arrival(0.0, 0)], [CASCADE]).answered
    first_stage_s = 0.01 * max(1, len(draft))
    assert one.total_s == pytest.approx(first_stage_s + 0.1 * steps)
    # 15 tokens of the larger model cost 15, and so much more for those that it would not have said.
    assert one.cost == pytest.approx(1.0 + 15.0 + wrong)


def test_a_draft_that_is_hopeless_ends_there_and_goes_up_as_far_as_it_came():
    small = Answer(10, 5, 0.2, 0.0, 15.0, (1, 2, 9, 9, END), (0.9, 0.4, 0.3, 0.2, 0.2))
    large = Answer(10, 5, 1.0, 1.0, 150.0, (1, 2, 3, 4, END))
    query = {SMALL: small, LARGE: large}
    (one,) = run_cascades(replicas(), [query], [Arrival(0.0, 0)], [CASCADE]).answered
    # Two tokens, both right: three are left to the larger model.
    assert one.total_s == pytest.approx(0.01 * 2 + 0.1 * 3)
    assert one.cost == pytest.approx(12.0 + 150.0)


@pytest.mark.parametrize(("certainty", "stages"), [(0.9, 1), (0.2, 2)])
def test_a_stage_that_counts_equal_answers_waits_for_all_and_pays_for_all(certainty, stages):
    several = SelfConsistency(3)
    own = Answer(10, 5, 0.9, 0.0, 15.0, (1, 2, 3, 4, END))
    counted = Answer(10, 5, certainty, 1.0, 50.0, (1, 2, 3, 4, END), beside=(9, 6))
    large = Answer(10, 5, 1.0, 1.0, 150.0, (1, 2, 3, 4, END))
    query = {SMALL: replace(own, counted=counted), LARGE: large}
    gear = Gear(100.0, (Stage(SMALL, 0.5, several), Stage(LARGE)), PROMISE)
    (one,) = run_cascades(replicas(), [query], [Arrival(0.0, 0)], [gear]).answered
    # Three prompts in one step, and eight more steps to the end of the longest; the larger model
    # has all of the draft right.
    large_s = 0.1 if stages == 2 else 0.0
    assert one.total_s == pytest.approx(0.01 + 8 * 0.01 + large_s, rel=0.2)
    assert one.cost == pytest.approx(50.0 + (150.0 if stages == 2 else 0.0))
    assert (one.stages, one.quality) == (stages, 1.0)


def test_shares_say_whose_turn_it_is_while_there_is_room():
    nodes = [FixedReplica(SMALL, name, FAST, 4) for name in ("a", "b")]
    gear = Gear(100.0, ALONE.stages, PROMISE, shares={"small": {"a": 0.75, "b": 0.25}})
    arrivals = [Arrival(n * 1.0, 0) for n in range(40)]
    busy = run_cascades(nodes, [SURE], arrivals, [gear]).busy_share
    assert busy["small on a"] == pytest.approx(3 * busy["small on b"])
    even = run_cascades(nodes, [SURE], arrivals, [ALONE]).busy_share
    assert even["small on a"] == pytest.approx(even["small on b"])
    # Who has no share gets what the other has no room for.
    alone = Gear(100.0, ALONE.stages, PROMISE, shares={"small": {"a": 1.0, "b": 0.0}})
    crowd = run_cascades(nodes, [SURE], [Arrival(0.0, 0)] * 6, [alone])
    assert crowd.busy_share["small on b"] > 0.0
    assert max(one.total_s for one in crowd.answered) < 0.1, "nobody waits for a slot"


def test_what_finds_no_slot_waits():
    run = run_cascades(replicas(slots=1), [SURE], [Arrival(0.0, 0)] * 3, [ALONE])
    assert [one.total_s for one in run.answered] == pytest.approx([0.05, 0.10, 0.15])


def test_a_trigger_waits_for_company_but_not_for_long():
    gear = Gear(100.0, ALONE.stages, PROMISE, {"small": 2})
    pair = run_cascades(replicas(), [SURE], [Arrival(0.0, 0), Arrival(0.02, 0)], [gear])
    assert pair.answered[0].total_s > 0.05 + 0.02 - 1e-9
    (lonely,) = run_cascades(replicas(), [SURE], [Arrival(0.0, 0)], [gear]).answered
    assert lonely.total_s == pytest.approx(0.05 + 0.05)


def test_a_trigger_is_for_idle_replicas_and_at_most_a_tenth_of_the_promise():
    gear = Gear(100.0, ALONE.stages, replace(PROMISE, p95_s=0.2), {"small": 2})
    (lonely,) = run_cascades(replicas(), [SURE], [Arrival(0.0, 0)], [gear]).answered
    assert lonely.total_s == pytest.approx(0.02 + 0.05)
    arrivals = [Arrival(0.0, 0), Arrival(0.0, 0), Arrival(0.025, 0)]
    run = run_cascades(replicas(), [SURE], arrivals, [gear])
    # The pair waits for nobody, one after the other; nor does who comes while it is computed.
    assert [one.total_s for one in run.answered] == pytest.approx([0.05, 0.06, 0.055])


def test_gears_shift_up_in_a_burst_and_down_after_it():
    gears = [Gear(200.0, CASCADE.stages, PROMISE), Gear(1e6, ALONE.stages, PROMISE)]
    calm = [Arrival(n * 1.0, 0) for n in range(5)]
    burst = [Arrival(5.0 + n * 0.005, 0) for n in range(400)]
    after = [Arrival(8.0 + n * 1.0, 0) for n in range(30)]
    policy = ShiftPolicy(dwell_s=5.0)
    run = run_cascades(replicas(), [UNSURE], [*calm, *burst, *after], gears, policy=policy)
    assert [gear for _, gear in run.shifts] == [0, 1, 0]
    assert 5.0 <= run.shifts[1][0] <= 5.5
    assert {one.gear for one in run.answered if one.at_s < 5.0} == {0}


@pytest.mark.parametrize(
    ("low", "at_s"),
    [
        # The gear without a trigger fills the slot; that of the next gear finds a lone job there.
        (Gear(1.0, ALONE.stages, PROMISE), (0.06, 0.095, 30.0)),
        # The next gear's batches wait longer than those of the gear in which the job came.
        (Gear(1.0, ALONE.stages, replace(PROMISE, p95_s=0.2), {"small": 4}), (0.095, 5.0)),
    ],
)
@pytest.mark.parametrize("goes_on", [True, False])
def test_who_waits_when_the_gear_shifts_is_not_forgotten(low, at_s, goes_on):
    gears = [low, Gear(1e9, ALONE.stages, PROMISE, {"small": 4})]
    arrivals = [Arrival(each, 0) for each in (at_s if goes_on else at_s[:-1])]
    run = run_cascades(replicas(slots=1), [SURE], arrivals, gears, policy=ShiftPolicy())
    assert run.shifts[1][0] == pytest.approx(0.1)
    (late,) = (each for each in run.answered if each.at_s == 0.095)
    assert late.total_s == pytest.approx(0.05 + 0.05)


def test_a_job_that_nobody_can_take_ends_the_run():
    with pytest.raises(AssertionError, match="every request is answered"):
        run_cascades(replicas(slots=0), [SURE], [Arrival(0.0, 0)], [ALONE], policy=ShiftPolicy())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 20.0), st.booleans()), max_size=40),
    st.integers(1, 3),
    st.floats(0.1, 20.0),
)
def test_every_request_is_answered_once_in_its_own_gear(coming, slots, dwell_s):
    arrivals = [Arrival(at_s, int(is_sure)) for at_s, is_sure in coming]
    gears = [Gear(50.0, CASCADE.stages, PROMISE), Gear(1e6, ALONE.stages, PROMISE)]
    policy = ShiftPolicy(dwell_s=dwell_s)
    run = run_cascades(replicas(slots), [UNSURE, SURE], arrivals, gears, policy=policy)
    assert sorted(one.at_s for one in run.answered) == sorted(each.at_s for each in arrivals)
    for one in run.answered:
        assert 0.0 < one.first_token_s <= one.total_s
        assert one.stages <= len(gears[one.gear].stages)
        assert one.cost == (1.0 if one.stages == 1 else 11.0)
    assert all(0.0 <= share <= 1.0 + 1e-9 for share in run.busy_share.values())
    again = run_cascades(replicas(slots), [UNSURE, SURE], arrivals, gears, policy=policy)
    assert again == run


def test_a_hopeless_draft_goes_on_once_the_stage_above_is_known_to_agree():
    """After four drafts of two tokens, all right, the fifth is whole."""
    small = Answer(10, 5, 0.2, 0.0, 15.0, (1, 2, 3, 4, END), (0.9, 0.4, 0.3, 0.2, 0.2))
    large = Answer(10, 5, 1.0, 1.0, 150.0, (1, 2, 3, 4, END))
    arrivals = [Arrival(n * 10.0, 0) for n in range(5)]
    run = run_cascades(replicas(), [{SMALL: small, LARGE: large}], arrivals, [CASCADE])
    *stopped, last = [one.total_s for one in run.answered]
    assert stopped == pytest.approx([0.01 * 2 + 0.1 * 3] * 4)
    # Four right tokens and its end: the larger model has its last step left.
    assert last == pytest.approx(0.01 * 5 + 0.1)


def test_a_rejected_draft_ends_with_the_tokens_that_are_decided_on():
    """However right it is: a stage that is decided on its first two is stopped there."""
    small = Answer(10, 5, 0.2, 0.0, 15.0, (1, 2, 3, 4, END), (0.4, 0.3))
    large = Answer(10, 5, 1.0, 1.0, 150.0, (1, 2, 3, 4, END))
    arrivals = [Arrival(n * 10.0, 0) for n in range(8)]
    queries = [{SMALL: small, LARGE: large}]
    run = run_cascades(replicas(), queries, arrivals, [CASCADE], hold_tokens=2)
    first, *_, last = run.answered
    assert first.total_s == pytest.approx(0.01 + 0.1 * 4), "nothing is known of its drafts yet"
    assert last.total_s == pytest.approx(0.01 * 2 + 0.1 * 3)


@pytest.mark.parametrize(("step_s", "computed"), [(0.03, 1), (0.01, 2), (0.005, 4), (0.001, 6)])
def test_a_draft_is_stopped_when_its_tokens_are_told_and_goes_up_without_the_later_ones(
    step_s, computed
):
    """Hopeless with its first token; those that may wait are told after 20 ms, or with its end."""
    small = Answer(10, 6, 0.2, 0.0, 16.0, (1, 2, 9, 9, 9, END), (0.4, 0.4, 0.3, 0.2, 0.2, 0.2))
    large = Answer(10, 5, 1.0, 1.0, 150.0, (1, 2, 3, 4, END))
    quick = FixedReplica(SMALL, "n", StepSpeed(((1, step_s), (16, step_s)), 0.0), 4)
    query = {SMALL: small, LARGE: large}
    run = run_cascades([quick, replicas()[1]], [query], [Arrival(0.0, 0)], [CASCADE])
    (one,) = run.answered
    below, above = one.times
    assert below.engine_s == pytest.approx(step_s * computed)
    assert above.engine_s == pytest.approx(0.1 * 4)
    assert one.cost == pytest.approx(11.0 + 150.0)
    assert run.device_s == pytest.approx(step_s * computed + 0.4)


@pytest.mark.parametrize(("is_whole", "telling_s"), [(False, 5 * 0.02), (True, 0.02)])
def test_who_takes_an_answer_whole_does_not_wait_for_each_token_to_be_told(is_whole, telling_s):
    told = replace(SLOW, tell_s=0.02)
    one = [FixedReplica(LARGE, "n", told, 4)]
    alone = replace(ALONE, stages=(Stage(LARGE),))
    (found,) = run_cascades(one, [SURE], [Arrival(0.0, 0)], [alone], is_whole=is_whole).answered
    assert found.total_s == pytest.approx(5 * (0.1 - 0.02) + telling_s)


def test_the_times_of_all_stages_are_the_whole_time():
    arrivals = [Arrival(n * 0.03, n % 2) for n in range(12)]
    run = run_cascades(replicas(slots=1), [UNSURE, SURE], arrivals, [CASCADE])
    for one in run.answered:
        spent_s = sum(each.queued_s + each.way_s + each.engine_s for each in one.times)
        assert one.total_s == pytest.approx(spent_s)
        assert [each.model for each in one.times] == [SMALL, LARGE][: one.stages]
    assert any(each.queued_s > 0 for one in run.answered for each in one.times)


@pytest.mark.parametrize(("share", "asked"), [(0.0, 0), (0.25, 5), (1.0, 20)])
def test_a_share_of_accepted_answers_is_asked_of_the_last_stage_too(share, asked):
    arrivals = [Arrival(n * 10.0, 0) for n in range(20)]
    run = run_cascades(replicas(), [SURE], arrivals, [CASCADE], shadow_share=share)
    assert [one.stages for one in run.answered] == [1] * 20
    assert {one.cost for one in run.answered} == {1.0}
    assert run.device_s == pytest.approx(20 * 0.05 + asked * 0.5)


def test_nobody_is_compared_while_jobs_wait_for_the_last_stage():
    arrivals = [Arrival(0.0, query) for query in (0, 0, 1, 0)]
    run = run_cascades(replicas(1), [UNSURE, SURE], arrivals, [CASCADE], shadow_share=1.0)
    plain = run_cascades(replicas(1), [UNSURE, SURE], arrivals, [CASCADE])
    assert run == plain


@pytest.mark.parametrize(
    ("at_s", "slots", "share", "compared_s"),
    [
        # Of four answers two were due while jobs waited; of two that come later one is.
        ((0.1, 0.2, 0.3, 0.4, 20.0, 30.0), 1, 0.5, 0.5),
        # Those that come while two are compared: the second is in the steps after the first one's.
        ((20.0, 20.06, 20.12, 20.18, 20.24), 4, 1.0, 0.6),
    ],
)
def test_an_answer_that_is_not_compared_is_left_out_for_good(at_s, slots, share, compared_s):
    arrivals = [*(Arrival(0.0, 0) for _ in range(3)), *(Arrival(each, 1) for each in at_s)]
    queries = [UNSURE, SURE]
    plain = run_cascades(replicas(slots), queries, arrivals, [CASCADE])
    run = run_cascades(replicas(slots), queries, arrivals, [CASCADE], shadow_share=share)
    assert run.device_s - plain.device_s == pytest.approx(compared_s)
