"""How many of the uncertain answers may go up while the stage above has more than it can do.

Additive increase, multiplicative decrease, on the wait in that stage's queue against a target: at
most once in PERIOD_S the share that may go up shrinks to CUT of itself while the wait is above the
target; while it is not, it grows by STEP for every PERIOD_S that passed. LEAST of them always go
up, so that nobody's questions are shut out. Which ones: every answer adds the share to a credit,
one that goes up takes 1 from it; so over any stretch the share holds to within an answer or two,
without a random draw.

A gear plan says which share of all answers goes up to a stage, and has placed replicas for those.
Under a plan the share is of all answers, certain ones earn credit too, and the first cut goes to
what is planned, at once: only what is more than that is too much. If the queue stays too long even
so, the load is above the plan's, and the share shrinks from there as it does without one.
"""

from dataclasses import dataclass, replace

PERIOD_S = 0.5
CUT = 0.7
STEP = 0.05
LEAST = 0.05
LEAST_OF_PROMISE = 0.1
"""Of a promised time, what a queue may take however slow the model is."""
MOST_SAVED = 8.0
"""Under a plan: ways up that certain answers leave for uncertain ones that come together."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class CapTarget:
    """What a stage's queue is held against."""

    queue_s: float = 0.0
    """Longest wait, as it was set; 0: from the promise."""
    answer_p95_s: float = 0.0
    """Promised for whole answers: what the answer itself does not take is left for the queue."""
    planned: float | None = None
    """Share of the answers below that a plan has go up to the stage; None without one."""

    def wait_s(self, answer_s: float) -> float:
        """Return how long the queue may be before an answer that takes `answer_s`."""
        if self.queue_s > 0:
            return self.queue_s
        return max(self.answer_p95_s - answer_s, LEAST_OF_PROMISE * self.answer_p95_s)


@dataclass(frozen=True, slots=True)
class CapState:
    """One deployment's way up to one stage."""

    share: float = 1.0
    """Of the uncertain answers, under a plan of all answers, those that may go up."""
    credit: float = 1.0
    """Answers that may go up; without a plan below 2: nothing is saved up for a burst."""
    changed_s: float = float("-inf")
    """When the share was last looked at, monotonic."""

    @property
    def is_open(self) -> bool:
        """Whether the answer that was offered last may go up."""
        return self.credit >= 1.0 - _ROUNDING


def offered(
    state: CapState, wait_s: float, target_s: float, now_s: float, planned: float | None = None
) -> CapState:
    """Return the state after an uncertain answer came to it while the queue is `wait_s` long.

    planned: share of all answers, in (0, 1], that a plan has go up; None without one.
    """
    share, credit, changed_s = state.share, state.credit, state.changed_s
    periods, unit = (now_s - changed_s) / PERIOD_S, planned or 1.0
    if periods >= 1.0:
        changed_s = now_s
        if wait_s <= target_s:
            share = min(1.0, share + STEP * unit * periods)
        else:
            share = unit if share > unit else max(LEAST * unit, share * CUT)
            credit = min(1.0, credit)
    most = 1.0 if planned is None else MOST_SAVED - share
    return CapState(share, min(most, credit) + share, changed_s)


def certain(state: CapState) -> CapState:
    """Return the state after an answer that does not go up, under a plan."""
    return replace(state, credit=min(MOST_SAVED, state.credit + state.share))


def gone_up(state: CapState) -> CapState:
    """Return the state after the answer that was offered last went up."""
    assert state.is_open, "a closed cap lets nobody through"
    return replace(state, credit=max(0.0, state.credit - 1.0))
