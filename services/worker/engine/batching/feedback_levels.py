"""Which job comes first: classes, levels of feedback, and a bound on waiting. Pure.

Skip-join multi-level feedback as in FastServe (Wu et al., 2023, arXiv 2305.05920, section 4.1):

- A new job enters the first level whose quantum is no shorter than its prefill.
- A job that has used up its level's quantum of tokens goes down one level; each is twice as long.
- Interactive jobs come before batch jobs, whatever their levels.
- A job that waits and has got no token for longer than its class's patience is lifted above all
  that were not, for one quantum of the first level. So everybody gets on, whatever arrives.

Among equals the first to arrive comes first, and none of them displaces another.
"""

from dataclasses import dataclass

FIRST_QUANTUM_TOKENS = 32
LEVELS = 6
"""The last has no end."""
PREFILL_TOKENS_PER_STEP = 16
"""Prompt tokens that cost about as much as one more token of an answer."""
PATIENCE_S = 5.0
BATCH_PATIENCE_S = 60.0

Rank = tuple[bool, bool, int]
"""Class and level: the smaller comes first."""


@dataclass(slots=True)
class Standing:
    """One job's place among the others."""

    is_batch: bool
    arrival: int
    """Order of submission."""
    level: int
    quantum_left: int
    progress_s: float
    """When it came in or got its last token, on the clock of the steps."""
    is_lifted: bool = False

    @property
    def rank(self) -> Rank:
        """What another must have less of to displace it."""
        return not self.is_lifted, self.is_batch and not self.is_lifted, self.level

    @property
    def order(self) -> tuple[Rank, int]:
        """Sorts first who comes first."""
        return self.rank, self.arrival


def enter(prefill_tokens: int, *, is_batch: bool, arrival: int, now_s: float) -> Standing:
    """Return the standing of a job that comes in and waits."""
    steps = prefill_tokens // PREFILL_TOKENS_PER_STEP
    level = next((at for at in range(LEVELS - 1) if steps <= _quantum(at)), LEVELS - 1)
    return Standing(
        is_batch=is_batch,
        arrival=arrival,
        level=level,
        quantum_left=_quantum(level),
        progress_s=now_s,
    )


def charge(standing: Standing, now_s: float) -> None:
    """Note a token of the job's answer, which may have been the last of its quantum."""
    standing.progress_s = now_s
    standing.quantum_left -= 1
    if standing.quantum_left > 0:
        return
    standing.is_lifted = False
    standing.level = min(standing.level + 1, LEVELS - 1)
    standing.quantum_left = _quantum(standing.level)


def lift_if_due(standing: Standing, now_s: float) -> None:
    """Lift a job that waits if its patience has ended."""
    patience_s = BATCH_PATIENCE_S if standing.is_batch else PATIENCE_S
    if not standing.is_lifted and now_s - standing.progress_s >= patience_s:
        standing.is_lifted = True
        standing.level = 0
        standing.quantum_left = _quantum(0)


def _quantum(level: int) -> int:
    return FIRST_QUANTUM_TOKENS << level
