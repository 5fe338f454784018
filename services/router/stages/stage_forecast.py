"""Foresees that a draft will go up, early enough to bring the next stage's checkpoint close.

At 4 tokens, and whenever there are twice as many, the draft is taken to go on as it began, up to
the usual length of its stage's answers; a certainty of that below the threshold says that it will
go up. Said once. Wrong in either direction it costs a read into memory, or the time that one would
have saved: whether the answer goes up is decided elsewhere.
"""

from collections.abc import Sequence

from services.router.stages.stage_watch import Yardstick

FIRST_LOOK_TOKENS = 4
MOST_TOKENS = 512
"""That an answer is continued to: more change no certainty by much, and take time."""


class StageForecast:
    """One stage's, from its first token on."""

    def __init__(self, yardstick: Yardstick, *, threshold: float, usual_tokens: float) -> None:
        """`usual_tokens`: length of the stage's answers, 0 when it is not known."""
        self._yardstick = yardstick
        self._threshold = threshold
        self._usual_tokens = min(int(usual_tokens), MOST_TOKENS)
        self._next_look = FIRST_LOOK_TOKENS
        self._has_said = False

    def look(self, logprobs: Sequence[float], margins: Sequence[float]) -> bool:
        """Return whether it is foreseen now, for the first time, that the draft will go up."""
        count = len(logprobs)
        if self._has_said or count < self._next_look:
            return False
        self._next_look = 2 * count
        length = max(count, self._usual_tokens)
        certainty = self._yardstick.certainty(
            _continued(logprobs, length), _continued(margins, length)
        )
        self._has_said = certainty < self._threshold
        return self._has_said


def _continued(values: Sequence[float], length: int) -> Sequence[float]:
    """Return the values over and over, so many of them."""
    whole, rest = divmod(length, len(values))
    return [*values] * whole + [*values[:rest]]
