"""Where answers go in simulated time: the router's own rules, asked with what the run has taught.

Drafts that nothing can save (`core/certainty/draft_worth.py`), whether an answer goes up
(`escalation.py`), and the cap on what goes up while the stage above has more than it can do
(`core/certainty/escalation_cap.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gearfall.core.certainty.draft_worth import Agreed, DraftTerms, is_worth_a_token
from gearfall.core.certainty.escalation import (
    Accept,
    AtOverload,
    EscalationPolicy,
    GoUp,
    Outcome,
    Outlook,
    Question,
    decide,
    decide_stop,
)
from gearfall.core.certainty.escalation_cap import CapState, CapTarget, certain, gone_up, offered
from gearfall.core.gears.gear_plan import Gear, planned_up
from gearfall.core.ids import ModelName
from gearfall.core.model_pace import ModelPace, Timing, UsualLength
from gearfall.simulation.cascades.answers import Answer, Query, answer_at
from gearfall.simulation.cascades.step_engine import StepSpeed

_ANY_LENGTH = 10**8


@dataclass(slots=True)
class WaysUp:
    """Owner of what one router learns of its models; every model of a gear is ready."""

    policy: EscalationPolicy
    now_s: Callable[[], float]
    oldest_wait_s: Callable[[ModelName], float]
    """How long the oldest of a model's jobs has waited that nobody has taken; 0 for none."""
    speeds: Mapping[ModelName, StepSpeed]
    agreed: dict[ModelName, Agreed] = field(default_factory=dict)
    """What became of the drafts that each model verified."""
    paces: dict[ModelName, ModelPace] = field(default_factory=dict)
    lengths: dict[ModelName, UsualLength] = field(default_factory=dict)
    caps: dict[ModelName, CapState] = field(default_factory=dict)

    def learn_draft(self, model: ModelName, verified: int, accepted: int) -> None:
        """Take a draft that a model verified."""
        self.agreed.setdefault(model, Agreed()).learn(verified, accepted)

    def learn(self, model: ModelName, timing: Timing) -> None:
        """Take a whole answer; without a cap nobody asks for it."""
        if self.policy.at_overload is not AtOverload.WAIT:
            self.paces.setdefault(model, ModelPace()).learn(timing)
            self.lengths.setdefault(model, UsualLength()).learn(timing.further_tokens + 1)

    def stop_tokens(self, gear: Gear, index: int, answer: Answer) -> int:
        """Return after how many tokens an answer may be stopped, 0: it runs to its end.

        It goes on while that is worth it to the stage above, but no further than the tokens that
        are decided on: a stage in `early` ends there if it goes up.
        """
        stage = gear.stages[index]
        tokens = max(1, answer.tokens_until(stage.threshold))
        if tokens >= answer.output_tokens:
            return 0
        terms = self._terms(stage.model, gear.stages[index + 1].model)
        most = min(answer.output_tokens, len(answer.reach)) if answer.token_ids else tokens
        while tokens < most and is_worth_a_token(tokens, terms):
            tokens += 1
        return tokens if tokens < answer.output_tokens else 0

    def _terms(self, below: ModelName, above: ModelName) -> DraftTerms:
        rate = self.agreed[above].rate if above in self.agreed else 0.0
        speed, next_speed = self.speeds[below], self.speeds[above]
        return DraftTerms(
            rate, speed.step_s(1), next_speed.step_s(1), next_speed.prefill_s_per_token
        )

    def judge_stop(self, gear: Gear, index: int, query: Query) -> Outcome:
        """Return what would become now of a draft that can't be accepted any more."""
        return decide_stop(self._question(gear, index, query))

    def judge(self, gear: Gear, index: int, query: Query) -> Outcome:
        """Return what becomes of a stage's answer now."""
        return decide(self._question(gear, index, query))

    def note(self, gear: Gear, index: int, query: Query, outcome: Outcome) -> None:
        """Remember what became of it."""
        above = gear.stages[index + 1 :]
        if isinstance(outcome, Accept) and above:
            self._stayed_below(gear, above[0].model)
        last = outcome.index if isinstance(outcome, GoUp) else len(gear.stages)
        if not isinstance(outcome, Accept):
            for at in range(index + 1, last):
                self._offer(gear, at, query, went_up=False)
        if isinstance(outcome, GoUp):
            self._offer(gear, outcome.index, query, went_up=True)

    def _question(self, gear: Gear, index: int, query: Query) -> Question:
        stage, above = gear.stages[index], range(index + 1, len(gear.stages))
        outlooks = [self._outlook(gear, at, query) for at in above]
        certainty = answer_at(query, stage).certainty
        return Question(index, certainty, stage.threshold, outlooks, policy=self.policy)

    def _target(self, gear: Gear, model: ModelName) -> CapTarget | None:
        queue_s, promised_s = self.policy.queue_target_s, gear.promise.p95_s
        if self.policy.at_overload is AtOverload.WAIT or not (queue_s or promised_s):
            return None
        planned = planned_up(gear.stages, gear.promise).get(model)
        return CapTarget(queue_s, promised_s, planned)

    def _outlook(self, gear: Gear, index: int, query: Query) -> Outlook:
        model = gear.stages[index].model
        target = self._target(gear, model)
        if target is None:
            return Outlook()
        queue_s, answer_s = self.oldest_wait_s(model), self._answer_s(model, query[model])
        is_open = self._offered(model, queue_s, answer_s, target).is_open
        return Outlook(queue_s=queue_s, answer_s=answer_s, is_capped=not is_open)

    def _answer_s(self, model: ModelName, answer: Answer) -> float:
        if model not in self.paces:
            return 0.0
        tokens = self.lengths[model].tokens(_ANY_LENGTH)
        return self.paces[model].answer_s(answer.prompt_tokens, tokens)

    def _offered(
        self, model: ModelName, queue_s: float, answer_s: float, target: CapTarget
    ) -> CapState:
        state, wait_s = self.caps.get(model, CapState()), target.wait_s(answer_s)
        return offered(state, queue_s, wait_s, self.now_s(), target.planned)

    def _offer(self, gear: Gear, index: int, query: Query, *, went_up: bool) -> None:
        model = gear.stages[index].model
        target = self._target(gear, model)
        if target is None:
            return
        seen = self._outlook(gear, index, query)
        if went_up or seen.is_capped:
            state = self._offered(model, seen.queue_s, seen.answer_s, target)
            self.caps[model] = gone_up(state) if went_up and state.is_open else state

    def _stayed_below(self, gear: Gear, model: ModelName) -> None:
        target = self._target(gear, model)
        if model in self.caps and target is not None and target.planned is not None:
            self.caps[model] = certain(self.caps[model])
