"""Whether an answer is given or goes up, and to which stage: one decision when a stage has ended.

| the stage                | and                                       | outcome             |
| ------------------------ | ----------------------------------------- | ------------------- |
| answered, certain enough |                                           | Accept              |
| answered, is the last    |                                           | Accept              |
| answered, uncertain      | no stage above may be asked               | Settle(reason)      |
| answered, uncertain      | stage j above may be asked                | GoUp(j)             |
| failed, is not the last  | the deadline passed, a lower one answered | Settle(DEADLINE)    |
| failed, is not the last  | else                                      | GoUp(the next)      |
| failed, is the last      | the deadline passed, a lower one answered | Settle(DEADLINE)    |
| failed, is the last      | else                                      | GiveUp              |

A stage above may be asked unless its model is not ready and the policy says not to wait
(`loading`), its queue is too long for all that ask (`overload`), or its expected time is more than
what is left (`deadline`). Of those that may, the lowest from which the whole way up fits the time
left is asked; where none does, the lowest that fits by itself. What was never measured counts as no
time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

from gearfall.core.errors import InvalidRequest

E = TypeVar("E", bound=Enum)

MAX_QUEUE_TARGET_S = 3600.0
UNMEASURED_ANSWER_S = 30.0
"""What an answer of a stage that was never measured is taken for before a draft is given up for it:
where less than twice as long is left, the draft is finished."""


class Degraded(Enum):
    """Why a less certain answer was given than the cascade would have given."""

    DEADLINE = "deadline"
    LOADING = "loading"
    OVERLOAD = "overload"


class WhileLoading(Enum):
    """What becomes of an uncertain answer while the next stage's model has no ready replica."""

    WAIT = "wait"
    ANSWER = "answer"


class AtDeadline(Enum):
    """What becomes of a request whose upper stage can't answer in time."""

    ANSWER = "answer"
    FAIL = "fail"


class AtOverload(Enum):
    """What becomes of an uncertain answer while the next stage's queue is too long."""

    WAIT = "wait"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class EscalationPolicy:
    """What a deployment allows; the defaults change no answer that would have come in time."""

    while_loading: WhileLoading = WhileLoading.WAIT
    at_deadline: AtDeadline = AtDeadline.ANSWER
    at_overload: AtOverload = AtOverload.WAIT
    queue_target_s: float = 0.0
    """Wait in an upper stage's queue from which fewer requests go up to it; 0: the promised 95th
    percentile of the gear in force."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What asking one stage now is expected to take."""

    is_ready: bool = True
    """Whether a replica of its model takes jobs."""
    start_s: float = 0.0
    """Until there is one; 0 when there is."""
    queue_s: float = 0.0
    """In the queue of ready replicas."""
    is_capped: bool = False
    """Whether its queue is too long for this answer to go up to it."""
    answer_s: float = 0.0
    """Prompt and expected answer on the model's measured speeds; 0 before any was measured."""

    @property
    def total_s(self) -> float:
        """From now to the whole answer."""
        return self.start_s + self.queue_s + self.answer_s


@dataclass(frozen=True, slots=True)
class Question:
    """All that the decision depends on, at the end of stage `index`."""

    index: int
    certainty: float | None
    """None: the stage failed."""
    threshold: float | None
    above: Sequence[Outlook]
    """Of the stages `index + 1` and on; empty at the last."""
    left_s: float = math.inf
    """To the deadline."""
    is_deadline_over: bool = False
    """Whether the stage failed because the deadline passed."""
    has_lower_answer: bool = False
    """Whether an earlier stage's answer can still be given."""
    policy: EscalationPolicy = EscalationPolicy()


@dataclass(frozen=True, slots=True)
class Accept:
    """The stage's answer is the choice's."""


@dataclass(frozen=True, slots=True)
class GoUp:
    """Stage `index` is asked."""

    index: int


@dataclass(frozen=True, slots=True)
class Settle:
    """The best answer so far is given, with its flag."""

    reason: Degraded


@dataclass(frozen=True, slots=True)
class GiveUp:
    """There is no answer to give."""


Outcome = Accept | GoUp | Settle | GiveUp


def decide(question: Question) -> Outcome:
    """Return what becomes of the choice; see the table."""
    if question.certainty is None:
        return _after_failure(question)
    threshold = question.threshold
    if not question.above or threshold is None or question.certainty >= threshold:
        return Accept()
    return _way_up(question)


def decide_stop(question: Question) -> Outcome:
    """Return the same for a draft that is not whole and that nothing can make certain any more.

    Stopped in the middle, it is no answer to fall back on when the deadline comes. Where there is
    no other it goes up only if that is expected to take half of the time that is left at most; what
    was never measured counts as UNMEASURED_ANSWER_S here.
    """
    outcome = decide(question)
    if question.has_lower_answer:
        return outcome
    above = [
        replace(each, answer_s=each.answer_s or UNMEASURED_ANSWER_S) for each in question.above
    ]
    in_half = decide(replace(question, above=above, left_s=question.left_s / 2))
    return outcome if isinstance(in_half, GoUp) else in_half


def entry_stage(stages: Sequence[Outlook], left_s: float) -> int:
    """Return the stage that a request begins with.

    The first, unless the way through all stages takes longer than is left and that from a later
    one on does not.
    """
    fitting = _lowest_whole_way(stages, range(len(stages)), left_s)
    return 0 if fitting is None else fitting


def _after_failure(question: Question) -> Outcome:
    gives_lower = question.has_lower_answer and question.policy.at_deadline is AtDeadline.ANSWER
    if question.is_deadline_over and gives_lower:
        return Settle(Degraded.DEADLINE)
    return GoUp(question.index + 1) if question.above else GiveUp()


def _way_up(question: Question) -> Outcome:
    above, policy = question.above, question.policy
    is_waited_for = policy.while_loading is WhileLoading.WAIT
    there = [at for at, outlook in enumerate(above) if outlook.is_ready or is_waited_for]
    if not there:
        return Settle(Degraded.LOADING)
    offered = [at for at in there if not above[at].is_capped]
    if not offered:
        return Settle(Degraded.OVERLOAD)
    to = _lowest_whole_way(above, offered, question.left_s)
    if to is None:
        alone = (at for at in offered if above[at].total_s <= question.left_s)
        to = next(alone, None)
    if to is None and policy.at_deadline is AtDeadline.FAIL:
        to = offered[0]
    return Settle(Degraded.DEADLINE) if to is None else GoUp(question.index + 1 + to)


def _lowest_whole_way(
    stages: Sequence[Outlook], offered: Sequence[int], left_s: float
) -> int | None:
    """Return the lowest stage from which all that are offered, one after another, fit."""
    for position, at in enumerate(offered):
        if sum(stages[each].total_s for each in offered[position:]) <= left_s:
            return at
    return None


def parse_degraded(name: str) -> Degraded | None:
    """Return the reason of that name, None for an empty one; raise InvalidRequest else."""
    return choice_of(Degraded, name, "degraded") if name else None


def choice_of(kind: type[E], name: str, field: str) -> E:
    """Return the member of that value; raise InvalidRequest that lists them."""
    try:
        return kind(name)
    except ValueError:
        known = " or ".join(each.value for each in kind)
        raise InvalidRequest(
            f"{field} {name[:40]!r} must be {known}", param=f"escalation.{field}"
        ) from None


def check_policy(policy: EscalationPolicy) -> None:
    """Raise InvalidRequest for a target that can't be."""
    target_s = policy.queue_target_s
    if not (math.isfinite(target_s) and 0.0 <= target_s <= MAX_QUEUE_TARGET_S):
        raise InvalidRequest(
            f"queue_target_s {target_s:g} must be between 0 and {MAX_QUEUE_TARGET_S:g} seconds",
            param="escalation.queue_target_s",
        )


def check_has_target(policy: EscalationPolicy, promised_p95_s: Sequence[float]) -> None:
    """Raise InvalidRequest when escalations are to be capped by a target that nothing gives.

    `promised_p95_s`: of each gear that may come into force; none without a gear plan.
    """
    if policy.at_overload is not AtOverload.ANSWER or policy.queue_target_s > 0:
        return
    if promised_p95_s and all(each > 0 for each in promised_p95_s):
        return
    why = "a gear of the plan promises no p95_s" if promised_p95_s else "there is no gear plan"
    raise InvalidRequest(
        f"at_overload answer needs queue_target_s: {why}, and nothing else says how long a wait is "
        "too long",
        param="escalation.queue_target_s",
    )
