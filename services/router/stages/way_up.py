"""Where one choice's answers go: puts the question to the decision, and notes what came of it."""

from collections.abc import Callable, Sequence

from gearfall.core.certainty.draft_worth import is_worth_a_token
from gearfall.core.certainty.escalation import (
    Accept,
    AtDeadline,
    Degraded,
    GoUp,
    Outcome,
    Question,
    Settle,
    WhileLoading,
    decide,
    decide_stop,
    entry_stage,
)
from gearfall.core.errors import DeadlineExceeded, GearfallError
from services.router.cost_metrics import RequestCosts
from services.router.stages.cascade import CascadeState, StageDone, StageStopped, Verdict
from services.router.stages.prospects import RequestProspects
from services.router.stages.stage_plan import StagePlan, StageReady
from services.router.stages.stage_run import Note
from services.router.text.answer_text import AnswerPiece

State = CascadeState[AnswerPiece]


class WayUp:
    """One choice's; knows its stages and what is expected of them, not how far it is."""

    def __init__(
        self,
        plans: Sequence[StagePlan],
        prospects: RequestProspects,
        costs: RequestCosts,
        left_s: Callable[[], float],
        note: Note,
    ) -> None:
        """`left_s`: seconds to the deadline."""
        self._plans = plans
        self._prospects = prospects
        self._costs = costs
        self._left_s = left_s
        self._note = note
        self.missed_start_s = 0.0
        """Expected, of starts that were caused by answers given without the model."""

    @property
    def gives_lower_at_deadline(self) -> bool:
        """Whether a stage that is late leaves the answer below it."""
        return self._prospects.policy.at_deadline is AtDeadline.ANSWER

    def entry(self) -> int:
        """Return the stage to begin with: a later one when the whole way takes too long."""
        if len(self._plans) == 1:
            return 0
        outlooks = [self._prospects.outlook(plan) for plan in self._plans]
        first = entry_stage(outlooks, self._left_s())
        if first > 0:
            skipped = ", ".join(plan.stage.model for plan in self._plans[:first])
            reason = f"{skipped}: the whole way takes longer than {self._left_s():.2f} s"
            self._note("skipped", reason, model=self._plans[first].stage.model)
        return first

    def judge(
        self, state: State, certainty: float | None, error: GearfallError | None = None
    ) -> Outcome:
        """Return what would become of an answer of that certainty, None: the stage failed."""
        return decide(self._question(state, certainty, error))

    def judge_stop(self, state: State, certainty: float) -> Outcome:
        """Return what would become of a draft that is stopped with at most that certainty."""
        return decide_stop(self._question(state, certainty))

    def draft_worth(self, index: int) -> Callable[[int], bool]:
        """Return whether a draft of stage `index`, by its tokens so far, is worth one more."""
        below, above = self._plans[index], self._plans[index + 1]
        if not isinstance(below, StageReady):
            return lambda _: False
        terms = self._prospects.draft_terms(below, above)
        return lambda drafted: is_worth_a_token(drafted, terms)

    def _question(
        self, state: State, certainty: float | None, error: GearfallError | None = None
    ) -> Question:
        threshold = state.stage.threshold
        is_certain = certainty is not None and threshold is not None and certainty >= threshold
        above = () if state.is_settled or is_certain else self._plans[state.index + 1 :]
        return Question(
            index=state.index,
            certainty=certainty,
            threshold=threshold,
            above=[self._prospects.outlook(plan) for plan in above],
            left_s=self._left_s(),
            is_deadline_over=isinstance(error, DeadlineExceeded),
            has_lower_answer=state.draft is not None,
            policy=self._prospects.policy,
        )

    def conclude(self, state: State, verdict: Verdict) -> Outcome:
        """Return what becomes of the choice at a stage's end, and remember it."""
        if isinstance(verdict, StageStopped):
            outcome: Outcome = verdict.outcome
        elif isinstance(verdict, StageDone):
            outcome = self.judge(state, verdict.certainty)
        else:
            return self.judge(state, None, verdict.error)
        if state.beginning is None:
            # Else what becomes of the answer was noted when its beginning was decided.
            self.note(state.index, outcome)
        return outcome

    def note(self, index: int, outcome: Outcome) -> None:
        """Remember whether an answer of stage `index` goes up, or why it does not."""
        above = self._plans[index + 1 :]
        if isinstance(outcome, GoUp):
            self._hold_back(self._plans[index + 1 : outcome.index])
            self._prospects.went_up(self._plans[outcome.index])
        elif isinstance(outcome, Accept) and above:
            self._prospects.stayed_below(above[0])
        elif isinstance(outcome, Settle):
            self._hold_back(above)
            if outcome.reason is not Degraded.OVERLOAD and not self._prospects.is_ready(above[0]):
                start_s = self._prospects.go_without(above[0])
                self.missed_start_s += start_s
                self._costs.started(start_s)

    def _hold_back(self, passed_over: Sequence[StagePlan]) -> None:
        """Remember which of the stages could have been asked but for their caps."""
        is_waited_for = self._prospects.policy.while_loading is WhileLoading.WAIT
        for plan in passed_over:
            outlook = self._prospects.outlook(plan)
            if outlook.is_capped and (outlook.is_ready or is_waited_for):
                self._prospects.held_back(plan)

    def hint(self, index: int) -> None:
        """The answer of stage `index` is likely to go up."""
        self._prospects.hint(self._plans[index + 1])
