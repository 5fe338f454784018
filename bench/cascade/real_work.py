"""What is asked in `bench.cascade real`: held-out sums, coming as a recorded trace has them come.

The trace has real arrivals and lengths; the demo models do sums. So time is compressed, one request
in so many is kept, and a request gets the question whose prompt has the same rank among all prompts
as its own: those that were long in the trace are the long sums. Pure.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from gearfall.demo.arithmetic import Question, Split, draw_distinct
from gearfall.simulation.arrivals import TraceRow

MAX_TOKENS = 16
"""More than the longest answer and its end."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a question and when it comes."""

    at_s: float
    question: int


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a trace and how it is squeezed."""

    rows: tuple[TraceRow, ...]
    """Of the whole part; the first second is 0."""
    trace_s: float

    def asks(self, per_s: float, duration_s: float, prompts: Sequence[int]) -> tuple[Ask, ...]:
        """Return so many requests a second on average; `prompts`: tokens of each question."""
        count = round(per_s * duration_s)
        keep = len(self.rows) / count
        assert keep >= 1.0, f"the trace has {len(self.rows)} requests, not {count}"
        kept = [self.rows[int(number * keep)] for number in range(count)]
        by_length = sorted(range(len(prompts)), key=lambda at: (prompts[at], at))
        order = list(range(count))
        # Many prompts are of one length: which of them gets which question is drawn, or those that
        # come together would all get the same.
        Random(0).shuffle(order)
        order.sort(key=lambda at: kept[at].prompt_tokens)
        rank = {at: place for place, at in enumerate(order)}
        squeeze = duration_s / self.trace_s
        return tuple(
            Ask(row.at_s * squeeze, by_length[rank[at] * len(prompts) // count])
            for at, row in enumerate(kept)
        )

    def thinned_by(self, per_s: float, duration_s: float) -> float:
        """Return how many requests of the trace stand behind each that is kept."""
        return len(self.rows) / round(per_s * duration_s)


def window_of(rows: Sequence[TraceRow], begin_s: float, end_s: float) -> Window:
    """Return the part of a trace between two times."""
    kept = [
        TraceRow(row.at_s - begin_s, row.prompt_tokens, row.output_tokens)
        for row in rows
        if begin_s <= row.at_s < end_s
    ]
    return Window(tuple(kept), end_s - begin_s)


def unseen_questions(count: int) -> tuple[Question, ...]:
    """Return questions that no model, threshold or profile has seen, in random order."""
    return draw_distinct(count, Split.TEST, Random("bench cascade"))


def profiled_questions(count: int) -> tuple[Question, ...]:
    """Return other questions, for the profile."""
    return draw_distinct(count, Split.CALIBRATION, Random("bench cascade"))


def lines_of(questions: Sequence[Question]) -> str:
    """Return questions as `gearfall profile` reads them."""
    lines = [json.dumps({"prompt": each.prompt, "answer": each.answer}) for each in questions]
    return "\n".join(lines) + "\n"
