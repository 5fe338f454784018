"""The table of the escalation decision, and what holds of every one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.escalation import (
    UNMEASURED_ANSWER_S,
    Accept,
    AtDeadline,
    Degraded,
    EscalationPolicy,
    GiveUp,
    GoUp,
    Outlook,
    Question,
    Settle,
    WhileLoading,
    decide,
    decide_stop,
    entry_stage,
)

ANSWER = EscalationPolicy(while_loading=WhileLoading.ANSWER)
STRICT = EscalationPolicy(at_deadline=AtDeadline.FAIL)
READY = Outlook()
COLD = Outlook(is_ready=False, start_s=10.0)
CAPPED = Outlook(is_capped=True)
SLOW = Outlook(queue_s=1.0, answer_s=4.0)


def asked(*above: Outlook, certainty: float | None = 0.4, **rest: object) -> Question:
    return Question(0, certainty, 0.5 if above else None, above, **rest)  # type: ignore[arg-type]


def failing(*above: Outlook, **rest: object) -> Question:
    return asked(*above, certainty=None, **rest)


@pytest.mark.parametrize(
    ("question", "outcome"),
    [
        (asked(READY, certainty=0.5), Accept()),
        (asked(READY), GoUp(1)),
        (asked(certainty=0.0), Accept()),
        (asked(CAPPED), Settle(Degraded.OVERLOAD)),
        (asked(CAPPED, certainty=0.5), Accept()),
        (asked(CAPPED, READY), GoUp(2)),
        (asked(CAPPED, COLD, policy=ANSWER), Settle(Degraded.OVERLOAD)),
        (failing(CAPPED), GoUp(1)),
        (asked(COLD), GoUp(1)),
        (asked(COLD, policy=ANSWER), Settle(Degraded.LOADING)),
        (asked(COLD, READY, policy=ANSWER), GoUp(2)),
        (asked(COLD, left_s=9.9), Settle(Degraded.DEADLINE)),
        (asked(COLD, left_s=10.0), GoUp(1)),
        (asked(COLD, left_s=9.9, policy=STRICT), GoUp(1)),
        (asked(SLOW, left_s=4.9), Settle(Degraded.DEADLINE)),
        (asked(SLOW, left_s=5.0), GoUp(1)),
        (asked(SLOW, READY, left_s=4.9), GoUp(2)),
        (asked(SLOW, SLOW, left_s=10.0), GoUp(1)),
        (asked(SLOW, SLOW, left_s=9.9), GoUp(2)),
        (asked(READY, COLD, left_s=5.0), GoUp(1)),
        (failing(READY), GoUp(1)),
        (failing(READY, is_deadline_over=True), GoUp(1)),
        (failing(READY, is_deadline_over=True, has_lower_answer=True), Settle(Degraded.DEADLINE)),
        (failing(is_deadline_over=True, has_lower_answer=True), Settle(Degraded.DEADLINE)),
        (failing(is_deadline_over=True, has_lower_answer=True, policy=STRICT), GiveUp()),
        (failing(has_lower_answer=True), GiveUp()),
        (failing(), GiveUp()),
    ],
)
def test_the_table(question, outcome):
    assert decide(question) == outcome


@pytest.mark.parametrize(
    ("stages", "left_s", "entry"),
    [
        ((READY, SLOW), math.inf, 0),
        ((SLOW, SLOW), 10.0, 0),
        ((SLOW, SLOW), 9.9, 1),
        ((SLOW, SLOW), 4.9, 0),
        ((READY, COLD), 9.9, 0),
        ((SLOW, SLOW, SLOW), 10.0, 1),
        ((SLOW, SLOW, SLOW), 5.0, 2),
    ],
)
def test_where_a_request_begins(stages, left_s, entry):
    assert entry_stage(stages, left_s) == entry


SECONDS = st.floats(0, 100)
OUTLOOKS = st.builds(Outlook, st.booleans(), SECONDS, SECONDS, st.booleans(), SECONDS)
POLICIES = st.builds(EscalationPolicy, st.sampled_from(WhileLoading), st.sampled_from(AtDeadline))


@given(
    certainty=st.one_of(st.none(), st.floats(0, 1)),
    above=st.lists(OUTLOOKS, max_size=4),
    left_s=st.floats(-1, 300),
    flags=st.tuples(st.booleans(), st.booleans()),
    policy=POLICIES,
)
def test_every_outcome_can_be_done(certainty, above, left_s, flags, policy):
    is_over, has_lower = flags
    question = Question(2, certainty, 0.5, above, left_s, is_over, has_lower, policy)
    outcome = decide(question)
    if isinstance(outcome, GoUp):
        assert 2 < outcome.index <= 2 + len(above)
    elif isinstance(outcome, Settle):
        # There is an answer to give, and it would have gone up.
        assert has_lower if certainty is None else certainty < 0.5
        assert above or certainty is None
        assert outcome.reason is not Degraded.DEADLINE or policy.at_deadline is AtDeadline.ANSWER
        if outcome.reason is Degraded.LOADING:
            assert policy.while_loading is WhileLoading.ANSWER
            assert not any(each.is_ready for each in above)
        if outcome.reason is Degraded.OVERLOAD:
            assert any(each.is_capped for each in above)
    else:
        assert isinstance(outcome, GiveUp) == (certainty is None)


@given(above=st.lists(OUTLOOKS, min_size=1, max_size=4), left_s=SECONDS, policy=POLICIES)
def test_more_time_never_takes_an_escalation_away(above, left_s, policy):
    def up(seconds: float) -> bool:
        return isinstance(decide(Question(0, 0.0, 0.5, above, seconds, policy=policy)), GoUp)

    assert not up(left_s) or up(left_s * 2 + 1)


@pytest.mark.parametrize(
    ("left_s", "has_lower", "policy", "outcome"),
    [
        (4.0, False, EscalationPolicy(), GoUp(1)),
        (3.9, False, EscalationPolicy(), Settle(Degraded.DEADLINE)),
        (3.9, True, EscalationPolicy(), GoUp(1)),
        (3.9, False, EscalationPolicy(at_deadline=AtDeadline.FAIL), GoUp(1)),
        (1.9, True, EscalationPolicy(), Settle(Degraded.DEADLINE)),
    ],
)
def test_a_draft_is_stopped_only_where_it_is_not_needed(left_s, has_lower, policy, outcome):
    above = [Outlook(answer_s=2.0)]
    question = Question(
        0, 0.1, 0.5, above, left_s=left_s, has_lower_answer=has_lower, policy=policy
    )
    assert decide_stop(question) == outcome


@pytest.mark.parametrize(
    ("left_s", "has_lower", "policy", "outcome"),
    [
        (math.inf, False, EscalationPolicy(), GoUp(1)),
        (2 * UNMEASURED_ANSWER_S, False, EscalationPolicy(), GoUp(1)),
        (1.9 * UNMEASURED_ANSWER_S, False, EscalationPolicy(), Settle(Degraded.DEADLINE)),
        (1.0, True, EscalationPolicy(), GoUp(1)),
        (1.0, False, STRICT, GoUp(1)),
    ],
)
def test_little_time_is_not_staked_on_a_stage_that_was_never_measured(
    left_s, has_lower, policy, outcome
):
    question = asked(READY, left_s=left_s, has_lower_answer=has_lower, policy=policy)
    assert decide_stop(question) == outcome
    assert decide(question) == GoUp(1), "an answer that is whole goes up all the same"


@given(
    above=st.lists(OUTLOOKS, min_size=1, max_size=4),
    left_s=SECONDS,
    policy=POLICIES,
    has_lower=st.booleans(),
)
def test_what_is_stopped_goes_where_it_would_have_gone(above, left_s, policy, has_lower):
    question = Question(
        0, 0.0, 0.5, above, left_s=left_s, has_lower_answer=has_lower, policy=policy
    )
    outcome = decide_stop(question)
    assert isinstance(outcome, Settle) or outcome == decide(question)
