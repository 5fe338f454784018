"""How many of the uncertain answers may go up while the stage above has more than it can do.

Additive increase, multiplicative decrease, on the wait in that stage's queue against a target: at
most once in PERIOD_S the share that may go up shrinks to CUT of itself while the wait is above the
target; while it is not, it grows by STEP for every PERIOD_S that passed. LEAST of them always go
up, so that nobody's questions are shut out. Which ones: every answer adds the share to a credit,
one that goes up takes 1 from it; so over any stretch the share holds to within an answer or two,
without a random draw.
"""

from dataclasses import dataclass, replace

PERIOD_S = 0.5
CUT = 0.7
STEP = 0.05
LEAST = 0.05
LEAST_OF_PROMISE = 0.1
"""Of a promised time, what a queue may take however slow the model is."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class CapTarget:
    """What a stage's queue is held against."""

    queue_s: float = 0.0
    """Longest wait, as it was set; 0: from the promise."""
    answer_p95_s: float = 0.0
    """Promised for whole answers: what the answer itself does not take is left for the queue."""

    def wait_s(self, answer_s: float) -> float:
        """Return how long the queue may be before an answer that takes `answer_s`."""
        if self.queue_s > 0:
            return self.queue_s
        return max(self.answer_p95_s - answer_s, LEAST_OF_PROMISE * self.answer_p95_s)


@dataclass(frozen=True, slots=True)
class CapState:
    """One deployment's way up to one stage."""

    share: float = 1.0
    credit: float = 1.0
    """Answers that may go up; below 2: nothing is saved up for a burst."""
    changed_s: float = float("-inf")
    """When the share was last looked at, monotonic."""

    @property
    def is_open(self) -> bool:
        """Whether the answer that was offered last may go up."""
        return self.credit >= 1.0 - _ROUNDING


def offered(state: CapState, wait_s: float, target_s: float, now_s: float) -> CapState:
    """Return the state after an uncertain answer came to it while the queue is `wait_s` long."""
    share, changed_s = state.share, state.changed_s
    periods = (now_s - changed_s) / PERIOD_S
    if periods >= 1.0:
        cut, grown = max(LEAST, share * CUT), min(1.0, share + STEP * periods)
        share, changed_s = (cut if wait_s > target_s else grown), now_s
    return CapState(share, min(1.0, state.credit) + share, changed_s)


def gone_up(state: CapState) -> CapState:
    """Return the state after the answer that was offered last went up."""
    assert state.is_open, "a closed cap lets nobody through"
    return replace(state, credit=max(0.0, state.credit - 1.0))
