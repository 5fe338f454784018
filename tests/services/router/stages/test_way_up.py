"""What is remembered of the stages that an answer passed over because of their caps."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from gearfall.core.certainty.escalation import (
    Accept,
    Degraded,
    EscalationPolicy,
    GoUp,
    Outcome,
    Settle,
    WhileLoading,
)
from gearfall.core.certainty.escalation_cap import LEAST
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.streaming import StreamMode
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from services.router.stages.cascade import (
    BeginningDecided,
    CascadeState,
    StageDone,
    StageStopped,
    step,
)
from services.router.stages.prospects import RequestProspects
from services.router.stages.way_up import WayUp
from services.router.text.answer_text import AnswerPiece
from tests.services.router.stages.test_prospects import BOTH, CAPPED, Rig, plan, timing

STAGES = (Stage(ModelName("a"), 0.5), Stage(ModelName("b"), 0.5), Stage(ModelName("c")))
ASKED = 2000


class NoCosts:
    """Nothing is counted here."""

    def spent(self, stage: str, device_s: float, flops: float) -> None: ...

    def started(self, start_s: float) -> None: ...

    def degraded(self, reason: Degraded) -> None: ...


def way(prospects: RequestProspects, left_s: float = 1e9) -> WayUp:
    plans = [replace(plan(stage.model), stage=stage) for stage in STAGES]

    def note(*_: Any, **__: Any) -> None: ...

    return WayUp(plans, prospects, NoCosts(), lambda: left_s, note)


def decided_whole(asked: WayUp, certainty: float) -> Outcome:
    return asked.conclude(CascadeState(STAGES), StageDone(FinishReason.STOP, certainty))


def decided_early(asked: WayUp, certainty: float) -> Outcome:
    """As `early` does: on the beginning of an answer that goes on if it stays."""
    undecided: CascadeState[AnswerPiece] = CascadeState(STAGES, mode=StreamMode.EARLY)
    outcome = asked.judge(undecided, certainty)
    if isinstance(outcome, GoUp):
        return asked.conclude(undecided, StageStopped(certainty, outcome))
    assert isinstance(outcome, Accept | Settle)
    asked.note(0, outcome)
    settled, _ = step(undecided, BeginningDecided(outcome))
    asked.conclude(settled, StageDone(FinishReason.STOP, certainty))
    return outcome


def outcomes(rig: Rig, policy: EscalationPolicy, *, left_s: float = 1e9) -> Counter[object]:
    """Let uncertain answers of the first stage come, ten a second."""
    asked, found = way(rig.request(policy), left_s), Counter[object]()
    for _ in range(ASKED):
        rig.now_s += 0.1
        found[decided_whole(asked, 0.1)] += 1
    return found


@pytest.mark.parametrize("ready", ["abc", "ab"])
def test_a_capped_stage_that_is_passed_over_still_gets_its_least(ready):
    """Once its share has shrunk; it gets as many whether or not a stage above is asked instead."""
    rig = Rig()
    policy = replace(CAPPED, while_loading=WhileLoading.ANSWER)
    rig.fleet.ready, rig.fleet.waits_s = set(ready), {"b": 5.0}
    found = outcomes(rig, policy)
    instead = GoUp(2) if "c" in ready else Settle(Degraded.OVERLOAD)
    assert set(found) == {GoUp(1), instead}
    assert LEAST * ASKED <= found[GoUp(1)] < 1.2 * LEAST * ASKED
    assert rig.prospects.shares()[BOTH, ModelName("b")] == LEAST


@pytest.mark.parametrize("decided", [decided_whole, decided_early])
@pytest.mark.parametrize(("certain", "goes_up"), [(4, 1.0), (3, 0.8), (0, 0.2)])
def test_under_a_plan_the_cap_first_refuses_what_is_more_than_planned(certain, goes_up, decided):
    """A fifth of all answers is planned to go up; `certain` are for each that is not."""
    rig = Rig()
    rig.fleet.ready = {"a", "b", "c"}
    asked = way(rig.request(CAPPED, planned_up={ModelName("b"): 0.2}))
    decided(asked, 0.1)
    rig.fleet.waits_s, rig.now_s = {"b": 5.0, "c": 5.0}, 1.0
    found = Counter[object]()
    for _ in range(200):
        found[decided(asked, 0.1)] += 1
        for _ in range(certain):
            assert decided(asked, 0.9) == Accept()
    assert rig.prospects.shares()[BOTH, ModelName("b")] == 0.2
    assert found[GoUp(1)] / 200 == pytest.approx(goes_up, abs=0.01)


def test_every_capped_stage_is_offered_the_answer_that_is_given_instead():
    rig = Rig()
    rig.fleet.ready, rig.fleet.waits_s = {"a", "b", "c"}, {"b": 5.0, "c": 5.0}
    found = outcomes(rig, CAPPED)
    assert min(found[GoUp(1)], found[GoUp(2)]) >= LEAST * ASKED * 0.9
    assert found[Settle(Degraded.OVERLOAD)] > 0.8 * ASKED


def test_a_stage_that_may_not_be_waited_for_is_offered_nothing():
    """It would save up for what could not go to it."""
    rig = Rig()
    rig.fleet.ready = {"a", "c"}
    policy = replace(CAPPED, while_loading=WhileLoading.ANSWER)
    assert outcomes(rig, policy) == {GoUp(2): ASKED}
    assert set(rig.prospects.shares()) == {(BOTH, ModelName("c"))}


def test_a_draft_is_worth_what_its_stages_take_and_agree_on():
    rig = Rig()
    asked = rig.request()
    for name, step_s in (("a", 0.01), ("b", 0.2)):
        for tokens in (10, 20):
            # A tenth of a step for each token of a prompt.
            answer = timing(tokens, 0.1 * step_s * tokens, further=10, further_s=10 * step_s)
            asked.learn(plan(name), answer, 11)
    assert not way(asked).draft_worth(0)(0), "no draft was verified yet"
    for _ in range(4):
        asked.learn_draft(plan("b"), 9, 8)
    is_worth = way(asked).draft_worth(0)
    # 32 agreed, 5 not: 0.865 ** 13 * 0.2 is 0.0304, and costs 0.01 + 0.02.
    assert [is_worth(drafted) for drafted in (0, 12, 13)] == [True, True, False]
    assert not way(asked).draft_worth(1)(0), "of the way from b to c nothing is known"
