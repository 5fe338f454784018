"""Runs one choice of a request through its stages; the cascade decides, this performs."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from gearfall.core.certainty.escalation import Outcome
from gearfall.core.errors import DeadlineExceeded, GearfallError, Unavailable
from gearfall.core.generation.usage import StageReport, Usage
from gearfall.core.ids import JobId
from services.router.generation import ChoiceEnd
from services.router.stages.cascade import (
    BeginningDecided,
    CascadeState,
    Effect,
    Fail,
    Finish,
    Piece,
    Release,
    StageDone,
    StageEnded,
    StageFailed,
    StartStage,
    Verdict,
    step,
)
from services.router.stages.cascade import Event as CascadeEvent
from services.router.stages.cascade import Replace as ReplaceText
from services.router.stages.counted_run import CountedRun, Sample
from services.router.stages.run_context import RunContext
from services.router.stages.shown_text import ShownText
from services.router.stages.stage_forecast import StageForecast
from services.router.stages.stage_jobs import AnyRun, AskedJob, Below, StageJobs
from services.router.stages.stage_plan import StagePlan, StageReady, StageUnfit
from services.router.stages.stage_run import StageRun
from services.router.stages.stage_watch import StageWatch, Yardstick
from services.router.stages.stage_words import in_words, why_up
from services.router.stages.way_up import WayUp
from services.router.text.answer_text import AnswerPiece

ANSWER_MARGIN_S = 0.05
"""Before the deadline: when a lower answer is given, so that it arrives in time."""


class ChoiceRun:
    """One choice on its way; `run` raises what the last stage failed with."""

    def __init__(self, context: RunContext, choice: int, plans: Sequence[StagePlan]) -> None:
        self._context = context
        self._choice = choice
        self._plans = plans
        self._way = WayUp(plans, context.prospects, context.costs, self._left_s, context.note)
        self._state: CascadeState[AnswerPiece] = CascadeState(
            tuple(each.stage for each in plans),
            index=self._way.entry(),
            mode=context.streaming.mode,
            is_whole=context.request.is_whole,
        )
        self._reports: dict[int, StageReport] = {}
        """By stage, in the order they ran."""
        self._jobs = StageJobs(context, choice)
        self._below: Below | None = None
        self._error: GearfallError | None = None
        self._shown = ShownText(choice, context.emit)

    async def run(self) -> None:
        """Run stage after stage until the cascade is done."""
        while not self._state.is_done:
            await self._run_stage(self._plans[self._state.index])
        if self._error is not None:
            raise self._error

    async def _run_stage(self, plan: StagePlan) -> None:
        if isinstance(plan, StageUnfit):
            report = _report_of_unfit(plan, self._context.measure)
            self._conclude(StageFailed(plan.error), lambda _: report)
            return
        error = self._context.start_error(plan.host.name)
        stage_run, asked = self._follow(plan)
        if error is not None:
            stage_run.on_failed(cannot_start(plan.host.name, error))
        try:
            with self._lower_answer_in_time(stage_run):
                if error is None:
                    is_shown = self._state.is_shown_early and isinstance(stage_run, StageRun)
                    with self._jobs.submitting(
                        plan, stage_run, asked, self._below, is_shown=is_shown
                    ):
                        await stage_run.ended
                verdict = await stage_run.ended
        finally:
            for job_id, _ in asked:
                self._context.jobs.close(job_id, "the request ended")
            self._context.costs.spent(plan.record.name, stage_run.device_s, stage_run.cost_flops)
        if stage_run.token_ids:
            self._below = Below(plan, stage_run.token_ids)
        timing = stage_run.timing()
        if timing is not None and isinstance(verdict, StageDone):
            self._context.prospects.learn(plan, timing, len(stage_run.token_ids))
        if stage_run.draft_tokens:
            self._context.prospects.learn_draft(
                plan, stage_run.draft_tokens, stage_run.accepted_draft_tokens
            )
        self._conclude(verdict, lambda accepted: stage_run.report(is_accepted=accepted))

    def _follow(self, plan: StageReady) -> tuple[AnyRun, Sequence[AskedJob]]:
        """Return the stage as it is followed, and its jobs with their listeners."""
        if plan.stage.self_consistency is not None and not self._state.is_settled:
            return self._follow_several(plan, plan.stage.self_consistency.samples)
        job_id = self._context.next_job_id()
        calibration = self._context.calibrations.get(plan.record.name)
        yardstick = Yardstick(self._context.measure, calibration, self._context.judged_tokens)
        run = self._stage_run(
            plan,
            job_id,
            self._on_piece,
            yardstick,
            watch=self._watch(plan, yardstick),
            forecast=self._forecast(plan, yardstick),
        )
        return run, ((job_id, run),)

    def _follow_several(self, plan: StageReady, count: int) -> tuple[AnyRun, Sequence[AskedJob]]:
        samples = []
        for _ in range(count):
            job_id, pieces = self._context.next_job_id(), list[AnswerPiece]()
            run = self._stage_run(plan, job_id, pieces.append, Yardstick(self._context.measure))
            samples.append(Sample(job_id, run, pieces))
        counted = CountedRun(
            samples,
            rule=self._context.agreement_rule,
            threshold=plan.stage.threshold or 0.0,
            on_piece=self._on_piece,
            close_job=self._context.jobs.close,
            judge_stop=self._judge_stop,
            counts_all=self._context.counts_all,
        )
        return counted, [(each.job_id, each.run) for each in samples]

    def _stage_run(
        self,
        plan: StageReady,
        job_id: JobId,
        on_piece: Callable[[AnswerPiece], None],
        yardstick: Yardstick,
        *,
        watch: StageWatch | None = None,
        forecast: StageForecast | None = None,
    ) -> StageRun:
        return StageRun(
            plan,
            self._context.request,
            job_id,
            yardstick=yardstick,
            watch=watch,
            forecast=forecast,
            on_falling=partial(self._hint, self._state.index),
            on_piece=on_piece,
            on_beginning=self._on_beginning,
            close_job=self._context.jobs.close,
            note=self._context.note,
        )

    def _watch(self, plan: StageReady, yardstick: Yardstick) -> StageWatch | None:
        threshold = plan.stage.threshold
        if self._state.is_settled or threshold is None:
            return None
        return StageWatch(
            yardstick,
            self._context.streaming,
            threshold=threshold,
            max_tokens=plan.max_tokens,
            judge=lambda certainty: self._way.judge(self._state, certainty),
            judge_stop=self._judge_stop,
            is_worth_a_token=self._way.draft_worth(self._state.index),
        )

    def _judge_stop(self, certainty: float) -> Outcome:
        return self._way.judge_stop(self._state, certainty)

    def _forecast(self, plan: StageReady, yardstick: Yardstick) -> StageForecast | None:
        threshold, prospects = plan.stage.threshold, self._context.prospects
        if self._state.is_settled or threshold is None:
            return None
        if prospects.is_ready(self._plans[self._state.index + 1]):
            return None
        usual_tokens = prospects.usual_tokens(plan)
        return StageForecast(yardstick, threshold=threshold, usual_tokens=usual_tokens)

    def _hint(self, index: int) -> None:
        """The answer of stage `index` is likely to go up."""
        if not self._state.is_settled:
            self._way.hint(index)

    def _left_s(self) -> float:
        return self._context.deadline_s - asyncio.get_running_loop().time()

    @contextlib.contextmanager
    def _lower_answer_in_time(self, stage_run: AnyRun) -> Iterator[None]:
        """End the stage a little before the deadline where a lower answer can be given then, or one
        of several that it has."""
        may_have = self._state.draft is not None or isinstance(stage_run, CountedRun)
        may_wait = self._context.counts_all and isinstance(stage_run, CountedRun)
        if not (may_wait or (may_have and self._way.gives_lower_at_deadline)):
            yield
            return
        loop, error = asyncio.get_running_loop(), DeadlineExceeded("no answer before the deadline")
        at_s = self._context.deadline_s - ANSWER_MARGIN_S
        timer = loop.call_at(at_s, self._end_for_lower, stage_run, error)
        try:
            yield
        finally:
            timer.cancel()

    def _end_for_lower(self, stage_run: AnyRun, error: GearfallError) -> None:
        is_certain = isinstance(stage_run, CountedRun) and stage_run.is_certain
        has_lower = self._state.draft is not None or stage_run.has_answer
        if is_certain or (has_lower and self._way.gives_lower_at_deadline):
            stage_run.on_failed(error)

    def _conclude(self, verdict: Verdict, report: Callable[[bool], StageReport]) -> None:
        """`report` takes whether the stage's answer is the one released."""
        index = self._state.index
        outcome = self._way.conclude(self._state, verdict)
        self._state, effects = step(self._state, StageEnded(verdict, outcome))
        given = next((each for each in effects if isinstance(each, Finish)), None)
        done = self._reports[index] = report(given is not None and given.index == index)
        self._context.note("answered", in_words(done), model=done.model, measured_s=done.duration_s)
        self._perform(effects)

    def _on_piece(self, piece: AnswerPiece) -> None:
        self._step(Piece(piece))

    def _on_beginning(self, decided: BeginningDecided) -> None:
        self._way.note(self._state.index, decided.outcome)
        self._step(decided)

    def _step(self, event: CascadeEvent[AnswerPiece]) -> None:
        self._state, effects = step(self._state, event)
        self._perform(effects)

    def _perform(self, effects: Sequence[Effect[AnswerPiece]]) -> None:
        for effect in effects:
            if isinstance(effect, Release):
                for piece in effect.pieces:
                    self._shown.show(piece)
            elif isinstance(effect, ReplaceText):
                self._replace(effect)
            elif isinstance(effect, Finish):
                self._context.emit(self._end(effect))
            elif isinstance(effect, Fail):
                self._error = effect.error
            elif isinstance(effect, StartStage):
                *_, below = self._reports.values()
                self._context.note("escalated", why_up(below))

    def _replace(self, effect: ReplaceText) -> None:
        model = self._plans[effect.dropped].stage.model
        following = self._plans[effect.index].stage.model
        characters = self._shown.replace(model, following)
        reason = f"{characters} characters of {model}, by {following}"
        self._context.note("replaced", reason, model=model)

    def _end(self, effect: Finish) -> ChoiceEnd:
        answer = self._reports[effect.index]
        if not answer.is_accepted:  # it went up, and comes back
            answer = self._reports[effect.index] = replace(answer, is_accepted=True)
        if effect.degraded is not None:
            reason = f"{answer.model} answers: {effect.degraded.value}"
            self._context.note("degraded", reason, model=answer.model)
            self._context.costs.degraded(effect.degraded)
        reports = tuple(self._reports.values())
        usage = Usage(
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            total_prompt_tokens=sum(each.all_prompt_tokens for each in reports),
            total_completion_tokens=sum(each.all_completion_tokens for each in reports),
            cost_flops=sum(each.cost_flops for each in reports),
            cached_tokens=answer.cached_tokens,
            device_s=sum(each.device_s for each in reports),
            start_s=sum(each.start_s for each in reports) + self._way.missed_start_s,
        )
        return ChoiceEnd(
            self._choice, effect.finish, answer.model, reports, usage, degraded=effect.degraded
        )


def cannot_start(model: str, reason: str) -> Unavailable:
    """Return the error of a request whose model does not come up."""
    return Unavailable(f"model {model} can't start: {reason}", retry_after_s=10.0)


def _report_of_unfit(plan: StageUnfit, measure: str) -> StageReport:
    return StageReport(
        model=plan.stage.model,
        measure=measure,
        certainty=None,
        threshold=plan.stage.threshold,
        prompt_tokens=0,
        completion_tokens=0,
        cost_flops=0.0,
        duration_s=0.0,
        queued_s=0.0,
        epochs=0,
        is_accepted=False,
        error=plan.error.message,
    )
