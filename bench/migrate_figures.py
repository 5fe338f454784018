"""Figures of `bench.migrate`: what each migration cost its client and the others. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

TOKENS, KV, AUTO = "tokens", "kv", "auto"
"""How a migration was asked for: by one path, or by what the cost model expects to be faster."""
KV_STREAM = "kv_stream"
"""By keys and values over gRPC, as where the socket can't be connected."""
NONE = "none"
"""Nothing was moved: what the others' times change by themselves on this machine."""


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
    others_before_s: tuple[float, ...]
    """Times between messages of the other requests, all eight decoding, before the move."""
    others_during_s: tuple[float, ...]
    target_before_s: tuple[float, ...] = ()
    """The same of the requests that ran on the target all the time."""
    target_during_s: tuple[float, ...] = ()

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
    others_p99_before_s: float
    others_p99_during_s: float
    target_p99_before_s: float
    """0 where nothing ran on the target."""
    target_p99_during_s: float
    duration_p50_s: float
    rounds_p50: float
    moved_bytes_p50: float
    prediction_error_p50: float | None
    """|predicted - real| / real; None where nothing was predicted."""

    @property
    def others_change(self) -> float:
        """By how much the p99 between tokens grew for those that stayed on the source."""
        return self.others_p99_during_s / self.others_p99_before_s - 1.0

    @property
    def target_change(self) -> float | None:
        """By how much it grew for those on the target; None where there were none."""
        if self.target_p99_before_s == 0.0:
            return None
        return self.target_p99_during_s / self.target_p99_before_s - 1.0


@dataclass(frozen=True, slots=True)
class Choices:
    """How often the cost model took the path that was faster on the median."""

    prompt_tokens: int
    made: int
    right: int
    faster: str
    """The path that was."""


def percentile(values: Iterable[float], share: float) -> float:
    """Return the nearest-rank percentile: 0.99 for p99. There must be a value."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarize(samples: Sequence[Sample]) -> list[Row]:
    """Sum up each (prompt, mode), shortest prompt first."""
    groups: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.prompt_tokens, sample.mode), []).append(sample)
    return [_row(*key, groups[key]) for key in sorted(groups)]


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
        chosen = [each.path for each in alike if each.mode == AUTO]
        if chosen and all(by_mode.values()):
            faster = min(by_mode, key=lambda mode: median(by_mode[mode]))
            found.append(Choices(prompt_tokens, len(chosen), chosen.count(faster), faster))
    return found


def _p99_s(rounds: Iterable[Sequence[float]]) -> float:
    """Return the p99 over all rounds, 0 where there is none."""
    values = [seconds for each in rounds for seconds in each]
    return percentile(values, 0.99) if values else 0.0


def _row(prompt_tokens: int, mode: str, group: Sequence[Sample]) -> Row:
    errors = [
        abs(each.predicted_s - each.duration_s) / each.duration_s
        for each in group
        if each.predicted_s > 0
    ]
    return Row(
        prompt_tokens=prompt_tokens,
        mode=mode,
        samples=len(group),
        pause_p50_s=percentile((each.pause_s for each in group), 0.5),
        pause_p99_s=percentile((each.pause_s for each in group), 0.99),
        steps_p50=percentile((each.pause_steps for each in group), 0.5),
        steps_p99=percentile((each.pause_steps for each in group), 0.99),
        others_p99_before_s=_p99_s(each.others_before_s for each in group),
        others_p99_during_s=_p99_s(each.others_during_s for each in group),
        target_p99_before_s=_p99_s(each.target_before_s for each in group),
        target_p99_during_s=_p99_s(each.target_during_s for each in group),
        duration_p50_s=percentile((each.duration_s for each in group), 0.5),
        rounds_p50=percentile((each.rounds for each in group), 0.5),
        moved_bytes_p50=percentile((each.moved_bytes for each in group), 0.5),
        prediction_error_p50=percentile(errors, 0.5) if errors else None,
    )
