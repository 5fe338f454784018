"""Figures of the generation bench: runs in, medians and paired ratios out. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.measuring.spread import Spread, spread

OURS = "gearfall"
OURS_EXACT = "gearfall exact"


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One engine's answer to one batch's work."""

    round_index: int
    engine: str
    way: str
    batch: int
    answer_tokens: int
    seconds: float
    agreement: float = 1.0
    """Of the answers, those that begin with gearfall's first token: is it the same model?"""

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, prompts' time included."""
        return self.answer_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """One engine at one batch, all rounds."""

    engine: str
    way: str
    batch: int
    tokens_per_s: Spread
    ours_over: Spread | None
    """gearfall's tokens a second over this engine's, round by round; None where they never met."""
    agreement: float
    """Least of all rounds; below 1 where rounding to bfloat16 chose another token."""
    bound_share: float
    """Of `batch` tokens for each time that the weights can be read."""


def best_ways(runs: Sequence[EngineRun]) -> dict[tuple[str, int], str]:
    """Return each engine's fastest way at each batch."""
    best: dict[tuple[str, int], EngineRun] = {}
    for run in runs:
        key = run.engine, run.batch
        if key not in best or run.tokens_per_s > best[key].tokens_per_s:
            best[key] = run
    return {key: run.way for key, run in best.items()}


def summarize(
    runs: Sequence[EngineRun], *, weight_bytes: int, read_bytes_per_s: float
) -> list[EngineSummary]:
    """Sum up every engine at every batch, by its fastest way in the first round."""
    first = min(run.round_index for run in runs)
    ways = best_ways([run for run in runs if run.round_index == first])
    found = []
    for (engine, batch), way in sorted(ways.items(), key=lambda item: (item[0][1], item[0][0])):
        own = [r for r in runs if (r.engine, r.batch, r.way) == (engine, batch, way)]
        speeds = spread(run.tokens_per_s for run in own)
        found.append(
            EngineSummary(
                engine=engine,
                way=way,
                batch=batch,
                tokens_per_s=speeds,
                ours_over=_ours_over(runs, own),
                agreement=min(run.agreement for run in own),
                bound_share=speeds.median * weight_bytes / (batch * read_bytes_per_s),
            )
        )
    return found


def _ours_over(runs: Sequence[EngineRun], theirs: Sequence[EngineRun]) -> Spread | None:
    ours = {(run.round_index, run.batch): run for run in runs if run.engine == OURS}
    ratios = [
        ours[run.round_index, run.batch].tokens_per_s / run.tokens_per_s
        for run in theirs
        if (run.round_index, run.batch) in ours
    ]
    return spread(ratios) if ratios else None
