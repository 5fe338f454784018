"""Whether a draft that can't be accepted any more is worth another token, for the stage above.

The stage above verifies a draft together with the prompt and is spared a step for each token that
it would have said itself, up to the first that it would not. So a further token of a draft of k is
worth the chance that the stage above agrees with it and with all k before it, times its step; and
it costs a step below and its place in the verification. With each token agreed with at one rate:

    another token    rate^(k + 1) * step_above_s > step_below_s + token_above_s

The left side falls with every token and the right one does not, so that looking one token ahead is
the best rule there is: what is not worth it now is not worth it later.

The rate is that of the drafts which went up lately: agreed tokens over those that were held against
an answer (a draft's first wrong token ends it). It counts one more that was wrong than were seen.
"""

from collections import deque
from dataclasses import dataclass

NEWEST = 32
"""Drafts that count."""
MIN_DRAFTS = 4
"""Before so many were verified nothing is known, and no draft is worth another token."""


@dataclass(frozen=True, slots=True)
class DraftTerms:
    """What a further token of a draft costs, and what it saves where it is agreed with."""

    rate: float
    """Of draft tokens that the stage above agrees with, given that it did so far; 0: unknown."""
    step_below_s: float
    step_above_s: float
    token_above_s: float
    """To verify a token of a draft: as a token of a prompt."""


def is_worth_a_token(drafted: int, terms: DraftTerms) -> bool:
    """Return whether a draft of so many tokens is worth one more."""
    saved_s = terms.rate ** (drafted + 1) * terms.step_above_s
    return saved_s > terms.step_below_s + terms.token_above_s


class Agreed:
    """Owner of what became of the newest drafts that went up one deployment's way to one stage."""

    def __init__(self) -> None:
        self._drafts: deque[tuple[int, int]] = deque(maxlen=NEWEST)

    def learn(self, verified: int, accepted: int) -> None:
        """Take a draft of `verified` tokens, of which the first `accepted` were right."""
        self._drafts.append((accepted, int(accepted < verified)))

    @property
    def rate(self) -> float:
        """Of tokens agreed with; 0 before enough drafts were verified."""
        if len(self._drafts) < MIN_DRAFTS:
            return 0.0
        right = sum(accepted for accepted, _ in self._drafts)
        wrong = sum(ended for _, ended in self._drafts)
        return right / (right + wrong + 1)
