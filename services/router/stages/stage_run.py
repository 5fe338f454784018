"""One stage's job as the router follows it: tokens in, text pieces out, a verdict at the end."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from gearfall.core.certainty.certainty import answer_probability
from gearfall.core.errors import DeadlineExceeded, GearfallError, Internal
from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.generation.usage import StageReport
from gearfall.core.ids import Epoch, JobId, WorkerId
from gearfall.core.model_pace import Timing
from services.router.generation import GenerationRequest
from services.router.stages.cascade import (
    BeginningDecided,
    StageDone,
    StageFailed,
    StageStopped,
    Verdict,
    cost_flops,
)
from services.router.stages.stage_forecast import StageForecast
from services.router.stages.stage_plan import StageReady
from services.router.stages.stage_watch import StageWatch, Yardstick
from services.router.text.answer_text import AnswerPiece, AnswerText


class Note(Protocol):
    """Takes a decision and its reason into the request log."""

    def __call__(
        self,
        decision: str,
        reason: str,
        *,
        model: str = "",
        predicted_s: float = 0.0,
        measured_s: float = 0.0,
    ) -> None:
        """Write it down."""
        ...


class StageRun:
    """A JobListener: collects one stage's answer until it is whole, stopped or failed."""

    def __init__(
        self,
        plan: StageReady,
        request: GenerationRequest,
        job_id: JobId,
        *,
        yardstick: Yardstick,
        watch: StageWatch | None,
        forecast: StageForecast | None,
        on_falling: Callable[[], None],
        on_piece: Callable[[AnswerPiece], None],
        on_beginning: Callable[[BeginningDecided], None],
        close_job: Callable[[JobId, str], None],
        note: Note,
    ) -> None:
        """`watch`, `forecast`: None where nothing can overrule the stage, or nothing is to be told.

        `on_falling` is called when the forecast says that the answer will go up.
        """
        self.ended: asyncio.Future[Verdict]
        self.ended = asyncio.get_running_loop().create_future()
        self._plan = plan
        self._job_id = job_id
        self._yardstick = yardstick
        self._watch = watch
        self._forecast = forecast
        self._on_falling = on_falling
        self._on_piece = on_piece
        self._on_beginning = on_beginning
        self._close_job = close_job
        self._note = note
        self._text = AnswerText(
            plan.tokenizer,
            stops=request.stop,
            stop_token_ids=() if request.ignore_eos else plan.record.eos_token_ids,
            with_logprobs=request.logprobs,
        )
        self._has_stops = bool(request.stop)
        self._shows_tokens = request.logprobs
        self.token_ids: list[int] = []
        """Of the answer so far."""
        self.draft_tokens = self.accepted_draft_tokens = 0
        """Verified of the draft that came along, and right."""
        self._logprobs: list[float] = []
        self._margins: list[float] = []
        self._cached_tokens = 0
        self._owners = 0
        self._queued_s = 0.0
        self.start_s = 0.0
        """Expected, of the start that the stage caused."""
        self.device_s = 0.0
        """That engines have told so far."""
        self._bound_s = self._first_s = self._last_s = 0.0
        """When the job was claimed, and its first and newest tokens came."""
        self._started_s = time.perf_counter()
        self._waits_since_s = self._started_s

    def on_bound(self, worker: WorkerId, epoch: Epoch, held_s: float) -> None:
        """Count the owner and the time it took to find one."""
        self._owners += 1
        self._bound_s = time.perf_counter() - held_s
        waited_s = self._bound_s - self._waits_since_s
        self._queued_s += waited_s
        name = self._plan.record.name
        self._note(
            "claimed", f"{name} epoch {epoch} by worker {worker}", model=name, measured_s=waited_s
        )

    def on_moved(self, worker: WorkerId, epoch: Epoch) -> None:
        """A migration: another owner, without a wait."""
        self._owners += 1
        tokens = len(self._logprobs)
        name = self._plan.record.name
        self._note(
            "moved", f"{name} epoch {epoch} to worker {worker} at token {tokens}", model=name
        )

    def on_lost(self, epoch: Epoch, reason: str) -> None:
        """The job waits again."""
        self._waits_since_s = time.perf_counter()
        tokens = len(self._logprobs)
        self._note(
            "lost",
            f"epoch {epoch} after {tokens} tokens: {reason}; put back in the queue",
            model=self._plan.record.name,
        )

    def on_run(self, run: TokenRun) -> None:
        """Release text; end at a finish or a stop string, or where the watch says so."""
        if self.ended.done():
            return
        self.device_s += run.device_s
        if run.finish is FinishReason.ERROR:
            self._end(StageFailed(Internal(f"the engine failed the job: {run.error}")))
            return
        if run.finish is FinishReason.DEADLINE:
            self._end(StageFailed(DeadlineExceeded("the deadline passed during generation")))
            return
        self._cached_tokens = max(self._cached_tokens, run.cached_tokens)
        self.draft_tokens += run.draft_tokens
        self.accepted_draft_tokens += run.accepted_draft_tokens
        # A stop string may end the answer at any token: the text is looked at after each.
        for part in _single(run) if self._has_stops else (run,):
            rest: TokenRun | None = part
            while rest is not None and not self.ended.done():
                rest = self._take(rest)

    def _take(self, whole: TokenRun) -> TokenRun | None:
        """Take in a run up to where it may end the answer, or decide on it; return what follows."""
        count, sign = self._take_numbers(whole)
        run, rest = _cut(whole, count)
        self.token_ids.extend(run.token_ids)
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s - run.held_s
        if self._forecast is not None and self._forecast.look(self._logprobs, self._margins):
            self._on_falling()
        piece = self._text.feed(run)
        if self._has_stops or not run.token_ids:
            sign = self._look(is_whole=run.finish is not None or self._text.stop_found)
        if isinstance(sign, StageStopped):
            self._close_job(self._job_id, "the answer goes up")
            self._end(sign)
            return None
        if piece is not None:
            self._on_piece(piece)
        if sign is not None:
            self._on_beginning(sign)
        if self._text.stop_found:
            if run.finish is None:
                self._close_job(self._job_id, "a stop string was found")
            self._end(StageDone(FinishReason.STOP, self._certainty()))
        elif run.finish is not None:
            self._end(StageDone(run.finish, self._certainty()))
        return rest

    def _take_numbers(self, run: TokenRun) -> tuple[int, BeginningDecided | StageStopped | None]:
        """Take in tokens' numbers up to where the watch speaks; return how many, and what it says.

        Where a stop string may end the answer, the text is looked at first.
        """
        last = len(run.token_ids) - 1
        for place in range(last + 1):
            # Rounding can leave a hair above 0, and no bound on what may follow would hold then.
            self._logprobs.append(min(run.logprobs[place], 0.0))
            self._margins.append(max(run.margins[place], 0.0))
            if not self._has_stops:
                sign = self._look(is_whole=run.finish is not None and place == last)
                if sign is not None:
                    return place + 1, sign
        return last + 1, None

    def on_failed(self, error: GearfallError) -> None:
        """The job ended without an answer."""
        self._end(StageFailed(error))

    def timing(self) -> Timing | None:
        """Return what the answer took; None for one that more than one owner gave, or none."""
        if self._owners != 1 or not self.token_ids:
            return None
        return Timing(
            computed_tokens=len(self._plan.prompt_token_ids) - self._cached_tokens,
            first_token_s=self._first_s - self._bound_s,
            further_tokens=len(self.token_ids) - 1,
            further_s=self._last_s - self._first_s,
            right_draft_tokens=self.accepted_draft_tokens,
        )

    def report(self, *, is_accepted: bool) -> StageReport:
        """Say what the stage did so far."""
        prompt, completion = len(self._plan.prompt_token_ids), len(self._logprobs)
        ended = self.ended.result() if self.ended.done() else None
        is_stopped = isinstance(ended, StageStopped)
        return StageReport(
            model=self._plan.record.name,
            measure=self._yardstick.name,
            certainty=None if isinstance(ended, StageFailed | None) else ended.certainty,
            threshold=self._plan.stage.threshold,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cost_flops=self.cost_flops,
            duration_s=time.perf_counter() - self._started_s,
            queued_s=self._queued_s,
            epochs=self._owners,
            is_accepted=is_accepted,
            error=ended.error.message if isinstance(ended, StageFailed) else "",
            cached_tokens=self._cached_tokens,
            token_logprobs=tuple(self._logprobs) if self._shows_tokens else (),
            token_margins=tuple(self._margins) if self._shows_tokens else (),
            draft_tokens=self.draft_tokens,
            accepted_draft_tokens=self.accepted_draft_tokens,
            stopped_early=is_stopped,
            device_s=self.device_s,
            start_s=self.start_s,
            spared_tokens=max(0, self._plan.max_tokens - completion) if is_stopped else 0,
        )

    @property
    def is_claimed(self) -> bool:
        """Whether some worker took the job."""
        return self._owners > 0

    @property
    def has_answer(self) -> bool:
        """No: one job has none before it has ended."""
        return False

    @property
    def probability(self) -> float:
        """Of the answer so far by its model, in [0, 1]."""
        return answer_probability(self._logprobs)

    @property
    def _wrong_draft_tokens(self) -> int:
        return self.draft_tokens - self.accepted_draft_tokens

    @property
    def cost_flops(self) -> float:
        """Arithmetic so far; a job that nobody claimed cost nothing."""
        answer = len(self._logprobs) + self._wrong_draft_tokens
        tokens = len(self._plan.prompt_token_ids) + answer
        return cost_flops(self._plan.parameters, tokens) if self._owners else 0.0

    def _look(self, *, is_whole: bool) -> BeginningDecided | StageStopped | None:
        if self._watch is None:
            return None
        return self._watch.look(self._logprobs, self._margins, is_whole=is_whole)

    def _certainty(self) -> float:
        return self._yardstick.certainty(self._logprobs, self._margins)

    def _end(self, verdict: Verdict) -> None:
        if not self.ended.done():
            self.ended.set_result(verdict)


def _single(run: TokenRun) -> Iterator[TokenRun]:
    """Yield a run of several tokens as runs of one, any other as it is."""
    tokens = len(run.token_ids)
    if tokens < 2:
        yield run
        return
    for place in range(tokens):
        yield _part(run, place, place + 1)


def _cut(run: TokenRun, count: int) -> tuple[TokenRun, TokenRun | None]:
    """Return the first `count` tokens of a run, and the others if there are any."""
    tokens = len(run.token_ids)
    if count >= tokens:
        return run, None
    return _part(run, 0, count), _part(run, count, tokens)


def _part(run: TokenRun, start: int, end: int) -> TokenRun:
    """Return the tokens from `start` to before `end` of a run; its finish is the last one's."""
    return replace(
        run,
        index=run.index + start,
        token_ids=run.token_ids[start:end],
        logprobs=run.logprobs[start:end],
        margins=run.margins[start:end],
        alternatives=run.alternatives[start:end],
        finish=run.finish if end == len(run.token_ids) else None,
    )
