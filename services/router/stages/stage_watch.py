"""Looks at an undecided stage's tokens: decides on its beginning, stops a hopeless draft.

| streaming | tokens                                  | the decision says | then                   |
| --------- | --------------------------------------- | ----------------- | ---------------------- |
| early     | the first `hold_tokens`, and more to be | Accept, Settle    | BeginningDecided, once |
| early     | the same                                | GoUp              | StageStopped           |
| any       | no continuation reaches the threshold   | GoUp              | StageStopped, unless   |
|           |                                         |                   | another token is worth |
|           |                                         |                   | it to the next stage   |
| any       | the same                                | Settle            | nothing, and asked     |
|           |                                         |                   | again at twice as many |

The decision is that of `escalation.py`, asked with the certainty of the beginning, or
with the most that the answer can still reach.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gearfall.core.certainty.calibration import Calibration, calibrated
from gearfall.core.certainty.certainty import measure_certainty
from gearfall.core.certainty.certainty_bounds import bound_of, has_bound
from gearfall.core.certainty.escalation import Accept, GoUp, Outcome, Settle
from gearfall.core.generation.streaming import Streaming, StreamMode
from services.router.stages.cascade import BeginningDecided, StageStopped

_CALIBRATED_LOOKS = 8
"""A calibrated bound takes fifteen times as long as a measure's: it is looked at again when there
is an eighth more tokens."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What a stage's certainty is measured with."""

    measure: str
    calibration: Calibration | None = None
    """In place of the measure."""
    tokens: int = 0
    """Of an answer, the first ones that are measured; 0: all."""

    @property
    def name(self) -> str:
        """How reports call it."""
        return "calibrated" if self.calibration else self.measure

    def certainty(self, logprobs: Sequence[float], margins: Sequence[float]) -> float:
        """Return the certainty of an answer, in [0, 1]."""
        if self.tokens:
            logprobs, margins = logprobs[: self.tokens], margins[: self.tokens]
        if self.calibration is not None:
            return calibrated(self.calibration, logprobs, margins)
        return measure_certainty(self.measure, logprobs, margins)


class StageWatch:
    """One stage's, from its first token on.

    Whether the answer goes up depends on the tokens and the decision, not on how many came at once.
    """

    def __init__(
        self,
        yardstick: Yardstick,
        streaming: Streaming,
        *,
        threshold: float,
        max_tokens: int,
        judge: Callable[[float], Outcome],
        judge_stop: Callable[[float], Outcome],
        is_worth_a_token: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """`judge`: what becomes of a beginning of that certainty; `judge_stop`: of a draft that can
        reach no more than that. `is_worth_a_token`: whether a draft of so many tokens that goes up
        is worth one more."""
        self._yardstick = yardstick
        self._threshold = threshold
        self._judge = judge
        self._judge_stop = judge_stop
        self._hold_tokens = streaming.hold_tokens if streaming.mode is StreamMode.EARLY else None
        self._last = min(
            max_tokens, self._hold_tokens or max_tokens, yardstick.tokens or max_tokens
        )
        """Tokens on which the stage is decided at the latest."""
        self._bound = bound_of(yardstick.measure, yardstick.calibration)
        self._stops_hopeless = streaming.finishes_drafts is not True and has_bound(
            yardstick.measure, yardstick.calibration
        )
        self._stops_at_once = streaming.finishes_drafts is False
        self._is_worth_a_token = is_worth_a_token
        self._seen = 0
        self._ask_from = 0
        self._is_over = False

    def look(
        self, logprobs: Sequence[float], margins: Sequence[float], *, is_whole: bool
    ) -> BeginningDecided | StageStopped | None:
        """Look at all tokens so far; `is_whole`: the answer ends with them."""
        if self._is_over:
            return None
        if self._hold_tokens is not None and len(logprobs) >= self._hold_tokens:
            self._is_over = True
            if is_whole and len(logprobs) == self._hold_tokens:
                return None
            held = slice(0, self._hold_tokens)
            return self._on_beginning(self._yardstick.certainty(logprobs[held], margins[held]))
        if is_whole or not self._stops_hopeless:
            return None
        seen = min(len(logprobs), self._last)
        for at in range(self._seen, seen):
            self._bound.add(logprobs[at], margins[at])
        self._seen = seen
        return self._stop_if_hopeless(len(logprobs))

    def _on_beginning(self, certainty: float) -> BeginningDecided | StageStopped:
        outcome = self._judge(certainty)
        if isinstance(outcome, GoUp):
            return StageStopped(certainty, outcome)
        assert isinstance(outcome, Accept | Settle), "an answer is given or goes up"
        return BeginningDecided(outcome)

    def _stop_if_hopeless(self, drafted: int) -> StageStopped | None:
        if self._seen < min(self._ask_from, self._last):
            return None
        most = self._bound.most(self._last - self._seen)
        if most >= self._threshold:
            if self._yardstick.calibration is not None:
                self._ask_from = self._seen + self._seen // _CALIBRATED_LOOKS + 1
            return None
        outcome = self._judge_stop(most)
        if not isinstance(outcome, GoUp):
            self._ask_from = 2 * self._seen
            return None
        if not self._stops_at_once and self._is_worth_a_token(drafted):
            return None
        self._is_over = True
        return StageStopped(most, outcome)
