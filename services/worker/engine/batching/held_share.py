"""How many tokens of held jobs a step may compute beside those who decode. Pure.

A held job is another worker's still: those who decode here must not wait for its prefill. A step of
`rows` that decode and n tokens more takes about decode_s(rows) + n * token_s; both parts are taken
from the steps that were. The held jobs' share is what makes a step longer by `GROWTH`, but enough
that they are whole in time if steps go on to take what the last ones took.
"""

from collections.abc import Sequence as Many
from math import ceil
from statistics import median
from typing import TypeVar

from services.worker.engine.batching.sequence import Chunk, Sequence

GROWTH = 0.15
"""By so much a step may take longer because of held jobs."""
PATIENCE_S = 40.0
"""So long after it came in a held job is to be whole if nobody said how soon."""
FIRST_TOKENS = 4
"""While nothing was measured."""
_KEPT = 16
_PASSES = 4
"""So many passes beside the steps tell its pace."""
_PASS_PART = 0.25
"""Of the time that is left, most that one pass may take: nobody can take it back."""

_Value = TypeVar("_Value")


class HeldShare:
    """Owner of what was measured of one engine's steps."""

    def __init__(self) -> None:
        self._decode_s: dict[int, list[float]] = {}
        """Newest times of steps that decoded so many rows and computed nothing else."""
        self._more: list[tuple[int, float]] = []
        """Of the newest steps that computed more: so many tokens, in so many seconds more."""
        self._last_s: list[float] = []
        """The last three steps: one that the machine held up says nothing about the next."""
        self._beside: list[tuple[int, float]] = []
        """Newest passes beside the steps: so many tokens, in so many seconds from begin to end."""

    def note(self, chunks: Many[Chunk], step_s: float) -> None:
        """A step that computed these chunks took so long."""
        self._last_s = [*self._last_s[-2:], step_s]
        rows = sum(1 for chunk in chunks if chunk.count == 1 and not chunk.sequence.is_held)
        more = sum(chunk.count for chunk in chunks) - rows
        if more == 0:
            _keep(self._decode_s.setdefault(rows, []), step_s)
            return
        decode_s = self._decode_step_s(rows)
        if decode_s > 0 or rows == 0:
            _keep(self._more, (more, step_s - decode_s))

    def note_beside(self, tokens: int, seconds: float) -> None:
        """So many tokens were computed beside the steps in so long."""
        _keep(self._beside, (tokens, seconds))

    def can_wait(self, missing: int, left_s: float) -> bool:
        """Whether so many tokens will be computed beside the steps in `left_s` seconds.

        By the pace of the newest passes, whose attention was nearly as long; else steps take part.
        The very first one was too short to tell the pace of others.
        """
        tokens, seconds = _sum(self._beside[1:])
        return seconds * missing <= left_s * tokens if tokens else left_s > 0

    def fit_pass(self, most: int, left_s: float) -> int:
        """Return how many of at most `most` tokens a pass may have that are due in `left_s`.

        At least one, and few while no pass tells how long it takes.
        """
        tokens, seconds = _sum(self._beside)
        if not tokens:
            return min(most, FIRST_TOKENS)
        fitting = _PASS_PART * left_s * tokens / seconds if seconds > 0 else most
        return max(1, int(min(most, fitting)))

    def find(self, running: Many[tuple[Sequence, int]], now_s: float) -> int:
        """Return how many tokens of held sequences the next step may compute, all together.

        `running`: who may compute how many tokens.
        """
        held = [(sequence, count) for sequence, count in running if sequence.is_held and count]
        if not held:
            return 0
        rows = sum(1 for sequence, count in running if count == 1 and not sequence.is_held)
        left_s = min(sequence.whole_by_s for sequence, _ in held) - now_s
        return self._tokens(rows, sum(count for _, count in held), left_s)

    def _tokens(self, rows: int, missing: int, left_s: float) -> int:
        """At least one of `missing` tokens, which are to be there in `left_s` seconds."""
        if rows == 0:
            return missing
        decode_s = self._decode_step_s(rows)
        if decode_s == 0.0 or not self._more:
            return min(missing, FIRST_TOKENS)
        # Few tokens more are lost in a step's noise: a share grows by steps that show it can.
        most = max(FIRST_TOKENS, 2 * self._more[-1][0])
        token_s = _ratio(self._more)
        fitting = min(most, int(GROWTH * decode_s / token_s)) if token_s > 0 else most
        step_s = max(decode_s, median(self._last_s))
        due = ceil(missing * step_s / left_s) if left_s > 0 else missing
        return min(missing, max(1, fitting, due))

    def _decode_step_s(self, rows: int) -> float:
        """Return a decode step's time, of as nearly so many rows as were measured; else 0."""
        if rows == 0 or not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda known: abs(known - rows))
        return median(self._decode_s[nearest])


def _sum(passes: Many[tuple[int, float]]) -> tuple[int, float]:
    """Return the tokens and the seconds of the newest passes."""
    newest = passes[-_PASSES:]
    return sum(tokens for tokens, _ in newest), sum(seconds for _, seconds in newest)


def _ratio(more: Many[tuple[int, float]]) -> float:
    """Return the seconds of a token; one step that the machine held up is left out."""
    slowest = max(more, key=lambda step: step[1] / step[0])
    counted = [step for step in more if step is not slowest] if len(more) > 2 else more
    return sum(seconds for _, seconds in counted) / sum(tokens for tokens, _ in counted)


def _keep(values: list[_Value], value: _Value) -> None:
    values.append(value)
    del values[:-_KEPT]
