"""Drafts of chosen correctness, and what verifying them was worth. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from bench.measuring.spread import Spread


@dataclass(frozen=True, slots=True)
class Timed:
    """One round of one set of jobs with drafts, and of the same without."""

    seconds: float
    plain_seconds: float
    answer_tokens: int
    draft_tokens: int
    """Verified."""
    accepted_tokens: int
    is_same: bool
    """Whether all answers were token for token those without a draft."""


@dataclass(frozen=True, slots=True)
class Worth:
    """All rounds of one kind of drafts."""

    model: str
    batch: int
    drafts: str
    """Which drafts these are."""
    ratio: Spread
    """Time without over time with the draft, round by round."""
    accepted_share: float
    """Accepted tokens over the answers' tokens: the share of decode steps that was saved."""
    draft_tokens: int
    accepted_tokens: int
    differing_rounds: int


def draft_with_prefix(answer: Sequence[int], share: float, vocabulary: int) -> tuple[int, ...]:
    """Return a draft as long as the answer, of which just that share is right, from its front."""
    right = round(len(answer) * share)
    wrong = ((token + 1) % vocabulary for token in answer[right:])
    return (*answer[:right], *wrong)


def worth_of(model: str, batch: int, drafts: str, rounds: Sequence[Timed]) -> Worth:
    """Sum up the rounds."""
    ratios = [each.plain_seconds / each.seconds for each in rounds]
    accepted = sum(each.accepted_tokens for each in rounds)
    return Worth(
        model,
        batch,
        drafts,
        Spread(median(ratios), min(ratios), max(ratios)),
        accepted / sum(each.answer_tokens for each in rounds),
        sum(each.draft_tokens for each in rounds),
        accepted,
        sum(not each.is_same for each in rounds),
    )


def break_even(worths: Sequence[Worth]) -> float | None:
    """Return the share of the answer from which on a draft saves time, between those measured.

    Linear between neighbours; 0 when even a wrong draft costs nothing, None when none saves.
    """
    points = sorted((each.accepted_share, each.ratio.median) for each in worths)
    if points[0][1] >= 1.0:
        return 0.0
    for (share, ratio), (more, better) in pairwise(points):
        if better >= 1.0:
            return share + (more - share) * (1.0 - ratio) / (better - ratio)
    return None
