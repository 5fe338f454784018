"""Figures of `bench.migrate`: what each migration cost its client and the others. Pure.

A request that moves makes the batch that it leaves smaller and the one that it joins larger, for
good: with three rows a step of this model takes 13.8 ms of one thread, with four 17.2. That is what
the request costs wherever it runs; the move costs what comes on top. So each time between messages
is taken in medians of its own batch: those that came before the request went on at the target
against the median before the move, those from then on against the median after it, settled. The
p99 of these multiples while the move was under way, over their p99 while it was not, is the
move's.

The raw figures stand beside it, and what they would be without a move: the p99 of a mixture of
times before the move and times in a batch with a request as long that was born on the target and
never moved (`NONE` has one there), in the proportion in which the move saw either batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from gearfall.simulation.fleet.figures import quantile

TOKENS, KV, AUTO = "tokens", "kv", "auto"
"""How a migration was asked for: by one path, or by what the cost model expects to be faster."""
KV_STREAM = "kv_stream"
"""By keys and values over gRPC, as where the socket can't be connected."""
NONE = "none"
"""Nothing was moved: what the others' times change by themselves on this machine; on the target in
a batch with a request as long as the one that would move."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Times between messages of the others on one worker, around one move, by when they came."""

    before_s: tuple[float, ...] = ()
    """From the moved request's first token to the move."""
    moving_s: tuple[float, ...] = ()
    """Until it went on at the target, with the batch as it was."""
    joined_s: tuple[float, ...] = ()
    """With its first tokens there and right behind them."""
    after_s: tuple[float, ...] = ()
    """Later, with the batch as it is now."""

    @property
    def calm(self) -> list[float]:
        """Those of no move, in medians of their own batch."""
        return _in_medians(self.before_s, self.before_s) + _in_medians(self.after_s, self.after_s)

    @property
    def disturbed(self) -> list[float]:
        """Those while it moved, in medians of their own batch."""
        return _in_medians(self.moving_s, self.before_s) + _in_medians(self.joined_s, self.after_s)


@dataclass(frozen=True, slots=True)
class Others:
    """What those on one worker noticed of all moves of a row."""

    before_p50_s: float
    before_p99_s: float
    during_p99_s: float
    """From the move's start to a few tokens behind its end, whatever the batch."""
    after_p50_s: float
    """0 where nothing moved."""
    calm_p99: float
    """In medians of the batch."""
    disturbed_p99: float
    born_p50_s: float = 0.0
    """With a request as long that was born there; 0 where none was."""
    control_p99_s: float = 0.0
    """Of as many times of either batch without a move; 0 where none was born there."""

    @property
    def change(self) -> float:
        """By how much the move made the p99 between tokens longer, batches taken apart."""
        return self.disturbed_p99 / self.calm_p99 - 1.0

    @property
    def raw_change(self) -> float:
        """By how much it grew with what the batch's own change makes of it."""
        return self.during_p99_s / self.before_p99_s - 1.0

    @property
    def control_change(self) -> float | None:
        """By how much it is longer than without a move in the same batches."""
        return self.during_p99_s / self.control_p99_s - 1.0 if self.control_p99_s else None


@dataclass(frozen=True, slots=True)
class Sample:
    """One migration of one request out of the batch."""

    mode: str
    prompt_tokens: int
    round_index: int
    path: str
    """The one that was taken."""
    pause_s: float
    """Longest time between two messages that the client saw from the move's start to its end."""
    step_s: float
    """Median time between two messages before the move."""
    reported_pause_s: float
    """From the source's last token to the target's first, by the source's clock."""
    duration_s: float
    """From the offer to the target's first token."""
    rounds: int
    moved_bytes: int
    """Of keys and values."""
    predicted_s: float
    """Of the path taken; 0 where nothing was predicted."""
    others: "Gaps"
    """Of those that stayed on the source."""
    target: "Gaps"
    """Of those that ran on the target all the time."""
    predicted_other_s: float = 0.0
    """By the path that was not taken; 0 where nothing was predicted."""

    @property
    def pause_steps(self) -> float:
        """The pause in decode steps of the batch that the request left."""
        return self.pause_s / self.step_s


@dataclass(frozen=True, slots=True)
class Stayed:
    """A migration that did not come about: the request went on where it was."""

    mode: str
    prompt_tokens: int
    round_index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """All migrations of one kind and prompt."""

    prompt_tokens: int
    mode: str
    samples: int
    pause_p50_s: float
    pause_p99_s: float
    steps_p50: float
    steps_p99: float
    others: Others
    target: Others | None
    """None where nothing ran on the target."""
    duration_p50_s: float
    rounds_p50: float
    moved_bytes_p50: float
    prediction_error_p50: float | None
    """|predicted - real| / real; None where nothing was predicted."""


@dataclass(frozen=True, slots=True)
class Choices:
    """How often the cost model took the path that was faster on the median.

    Each move of which both times were predicted is a choice: where the path was asked for, what
    the model would have taken in its place.
    """

    prompt_tokens: int
    made: int
    right: int
    faster: str
    """The path that was."""
    slower_by: float
    """So much longer the other one's median is: what a wrong choice costs."""


def summarize(samples: Sequence[Sample]) -> list[Row]:
    """Sum up each (prompt, mode), shortest prompt first."""
    groups: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.prompt_tokens, sample.mode), []).append(sample)
    rows = []
    for prompt_tokens, mode in sorted(groups):
        unmoved = [] if mode == NONE else groups.get((prompt_tokens, NONE), [])
        born_s = [gap for each in unmoved for gap in (*each.target.before_s, *each.target.moving_s)]
        rows.append(_row(prompt_tokens, mode, groups[prompt_tokens, mode], born_s))
    return rows


def judge(samples: Sequence[Sample], stayed: Sequence[Stayed] = ()) -> list[Choices]:
    """Hold what the cost model chose against the medians of both paths, for each prompt.

    A move that did not come about counts as one that never ended.
    """
    found = []
    for prompt_tokens in sorted({each.prompt_tokens for each in samples}):
        alike = [each for each in samples if each.prompt_tokens == prompt_tokens]
        nevers = [each.mode for each in stayed if each.prompt_tokens == prompt_tokens]
        by_mode = {
            mode: [each.duration_s for each in alike if each.mode == mode]
            + [math.inf] * nevers.count(mode)
            for mode in (TOKENS, KV)
        }
        chosen = [path for each in alike if (path := _chosen(each))]
        if chosen and all(by_mode.values()):
            medians = {mode: median(times) for mode, times in by_mode.items()}
            faster = min(medians, key=lambda mode: medians[mode])
            slower_by = max(medians.values()) / medians[faster] - 1.0
            right = chosen.count(faster)
            found.append(Choices(prompt_tokens, len(chosen), right, faster, slower_by))
    return found


def _chosen(sample: Sample) -> str:
    """Return the path that the cost model chose, or would have; empty if it had nothing to go by.

    The socket and the stream are one choice: which of them it is, the network decides.
    """
    path = KV if sample.path == KV_STREAM else sample.path
    if sample.mode == AUTO:
        return path
    if not (sample.predicted_s > 0 and sample.predicted_other_s > 0):
        return ""
    other = TOKENS if path == KV else KV
    return path if sample.predicted_s <= sample.predicted_other_s else other


def _in_medians(values: Sequence[float], batch: Sequence[float]) -> list[float]:
    """Return them in medians of their batch; none where that one was not seen."""
    return [value / median(batch) for value in values] if batch else []


def _others(gaps: Sequence[Gaps], born_s: Sequence[float] = ()) -> Others | None:
    """Sum up what those on one worker noticed; None where nobody was there.

    `born_s`: their times with a request as long that was born there.
    """
    before = [gap for each in gaps for gap in each.before_s]
    moving = [gap for each in gaps for gap in each.moving_s]
    joined = [gap for each in gaps for gap in each.joined_s]
    during = moving + joined
    after = [gap for each in gaps for gap in each.after_s]
    if not before or not during:
        return None
    return Others(
        before_p50_s=median(before),
        before_p99_s=quantile(before, 0.99),
        during_p99_s=quantile(during, 0.99),
        after_p50_s=median(after) if after else 0.0,
        calm_p99=quantile((gap for each in gaps for gap in each.calm), 0.99),
        disturbed_p99=quantile((gap for each in gaps for gap in each.disturbed), 0.99),
        born_p50_s=median(born_s) if born_s else 0.0,
        control_p99_s=_mixed_p99((before, len(moving)), (born_s, len(joined))) if born_s else 0.0,
    )


def _mixed_p99(*parts: tuple[Sequence[float], int]) -> float:
    """Return the p99 of a mixture: so many values such as each part's."""
    weighed = [(value, count / len(values)) for values, count in parts for value in values]
    left = 0.01 * sum(count for _, count in parts)
    for value, weight in sorted(weighed, reverse=True):
        left -= weight
        if left < 0.0:
            return value
    return 0.0


def _row(prompt_tokens: int, mode: str, group: Sequence[Sample], born_s: Sequence[float]) -> Row:
    errors = [
        abs(each.predicted_s - each.duration_s) / each.duration_s
        for each in group
        if each.predicted_s > 0
    ]
    others = _others([each.others for each in group])
    assert others is not None, "nobody stayed on the source"
    return Row(
        prompt_tokens=prompt_tokens,
        mode=mode,
        samples=len(group),
        pause_p50_s=quantile((each.pause_s for each in group), 0.5),
        pause_p99_s=quantile((each.pause_s for each in group), 0.99),
        steps_p50=quantile((each.pause_steps for each in group), 0.5),
        steps_p99=quantile((each.pause_steps for each in group), 0.99),
        others=others,
        target=_others([each.target for each in group], born_s),
        duration_p50_s=quantile((each.duration_s for each in group), 0.5),
        rounds_p50=quantile((each.rounds for each in group), 0.5),
        moved_bytes_p50=quantile((each.moved_bytes for each in group), 0.5),
        prediction_error_p50=quantile(errors, 0.5) if errors else None,
    )
