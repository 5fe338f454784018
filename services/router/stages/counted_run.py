"""Several answers of one stage to one prompt, followed as one: shown is the one most agree on.

| an answer ends                             | then                                               |
| ------------------------------------------ | -------------------------------------------------- |
| the others can't change what becomes of it | they are cancelled, the stage is done              |
| others may change it                       | nothing                                            |
| none can be certain, nor can it go up      | nothing: the largest group of all is to be given   |
| it failed, others may come                 | nothing: it agrees with none                       |
| it was the last that could come            | the stage is done, or failed as the first one did  |
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from gearfall.core.certainty.agreement import answer_key
from gearfall.core.certainty.escalation import GoUp, Outcome
from gearfall.core.certainty.self_consistency import (
    MEASURE,
    Consensus,
    Vote,
    consensus,
    is_decided,
    most_certainty,
)
from gearfall.core.errors import GearfallError
from gearfall.core.generation.usage import StageReport
from gearfall.core.ids import JobId
from gearfall.core.model_pace import Timing
from services.router.stages.cascade import StageDone, StageFailed, Verdict
from services.router.stages.stage_run import StageRun
from services.router.text.answer_text import AnswerPiece


@dataclass(slots=True)
class Sample:
    """One of the answers."""

    job_id: JobId
    run: StageRun
    """Its pieces go to `pieces`."""
    pieces: list[AnswerPiece] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict | None:
        """None while it may come."""
        return self.run.ended.result() if self.run.ended.done() else None

    def vote(self, rule: str) -> Vote | None:
        """Return the whole answer as it counts, None without one."""
        if not isinstance(self.verdict, StageDone):
            return None
        text = "".join(piece.text for piece in self.pieces)
        return Vote(answer_key(text, rule), self.run.probability)


class CountedRun:
    """To its owner what one `StageRun` is; the jobs' listeners are the samples' runs."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        rule: str,
        threshold: float,
        on_piece: Callable[[AnswerPiece], None],
        close_job: Callable[[JobId, str], None],
        judge_stop: Callable[[float], Outcome],
        counts_all: bool = False,
    ) -> None:
        """`rule`: by which answers are the same. `on_piece` gets the shown answer's, at the end.
        `judge_stop`: what becomes of the stage if it stops where it can't be more certain.
        `counts_all`: an answer that is certain enough is given when all came."""
        self.ended: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.start_s = 0.0
        """Expected, of the start that the stage caused."""
        self._samples = samples
        self._rule = rule
        self._threshold = threshold
        self._on_piece = on_piece
        self._close_job = close_job
        self._judge_stop = judge_stop
        self._counts_all = counts_all
        self.is_certain = False
        """Whether an answer is to be given, whatever else comes."""
        self._found: Consensus | None = None
        for each in samples:
            each.run.ended.add_done_callback(self._look)

    def on_failed(self, error: GearfallError) -> None:
        """No further answer comes: those that there are decide."""
        for each in self._samples:
            each.run.on_failed(error)

    @property
    def has_answer(self) -> bool:
        """Whether there is something to give if no further answer comes."""
        return any(isinstance(each.verdict, StageDone) for each in self._samples)

    @property
    def token_ids(self) -> list[int]:
        """Of the answer that is shown."""
        return self._shown.run.token_ids

    @property
    def draft_tokens(self) -> int:
        """Verified, in all answers."""
        return sum(each.run.draft_tokens for each in self._samples)

    @property
    def accepted_draft_tokens(self) -> int:
        """Of those, right."""
        return sum(each.run.accepted_draft_tokens for each in self._samples)

    @property
    def device_s(self) -> float:
        """Of all answers."""
        return sum(each.run.device_s for each in self._samples)

    @property
    def cost_flops(self) -> float:
        """Of all answers."""
        return sum(each.run.cost_flops for each in self._samples)

    def timing(self) -> Timing | None:
        """Return what the shown answer took."""
        return self._shown.run.timing()

    def report(self, *, is_accepted: bool) -> StageReport:
        """Say what the stage did so far."""
        shown = self._shown.run.report(is_accepted=is_accepted)
        others = [
            each.run.report(is_accepted=False)
            for each in self._samples
            if each is not self._shown and each.run.is_claimed
        ]
        error = self.ended.result() if self.ended.done() else None
        return replace(
            shown,
            measure=MEASURE,
            certainty=None if self._found is None else self._found.certainty,
            error=error.error.message if isinstance(error, StageFailed) else "",
            cost_flops=self.cost_flops,
            device_s=self.device_s,
            start_s=self.start_s,
            draft_tokens=self.draft_tokens,
            accepted_draft_tokens=self.accepted_draft_tokens,
            samples=len(self._samples),
            agreeing=0 if self._found is None else self._found.agreeing,
            other_prompt_tokens=sum(each.prompt_tokens for each in others),
            other_completion_tokens=sum(each.completion_tokens for each in others),
        )

    @property
    def _shown(self) -> Sample:
        return self._samples[self._found.place if self._found else 0]

    def _look(self, _ended: asyncio.Future[Verdict]) -> None:
        if self.ended.done():
            return
        pending = [each for each in self._samples if each.verdict is None]
        found = consensus([each.vote(self._rule) for each in self._samples])
        if found is None:
            if not pending:
                self._fail()
            return
        asked, left = len(self._samples), len(pending)
        if not is_decided(found, asked=asked, pending=left, threshold=self._threshold):
            return
        self.is_certain = found.certainty >= self._threshold
        if pending and self.is_certain and self._counts_all:
            return
        if pending and not self.is_certain:
            most = most_certainty(found, asked=asked, pending=left)
            if not isinstance(self._judge_stop(most), GoUp):
                return
        self._found = found
        for each in pending:
            self._close_job(each.job_id, "the other answers decided")
        self._give(self._samples[found.place], found.certainty)

    def _give(self, shown: Sample, certainty: float) -> None:
        verdict = shown.verdict
        assert isinstance(verdict, StageDone), "only a whole answer is shown"
        for piece in shown.pieces:
            self._on_piece(piece)
        self.ended.set_result(StageDone(verdict.finish, certainty))

    def _fail(self) -> None:
        failed = [each.verdict for each in self._samples]
        first = next(each for each in failed if isinstance(each, StageFailed))
        self.ended.set_result(first)
