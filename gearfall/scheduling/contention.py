"""Who goes first where several models want the same places: the one that would lose most.

Regret-based greedy choice: a model's regret is the seconds that its second-best place is behind its
best one, times the jobs that wait for it. Whoever regrets most is placed; what that took changes
the others' options and regrets. Those who have waited out their patience go before all others, the
longest wait first, so that nobody is passed over for ever. See docs/decisions/0012.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gearfall.core.ids import ModelName
from gearfall.scheduling.autoscaler import SchedulerPolicy
from gearfall.scheduling.placement import Option
from gearfall.scheduling.placement_search import Search
from gearfall.scheduling.wants import Urgency, Want

NOWHERE_S = 60.0
"""What having no other place counts as."""
_MOST_JOBS = 16
"""Waiting jobs that count; beyond, one model's queue would outweigh everybody else."""


@dataclass(slots=True)
class Contender:
    """A want with the places that are left for it, best first."""

    want: Want
    options: list[Option]
    search: Search | None = None
    """All workers as they were looked at for the options; None where only some were."""


def take_next(contenders: list[Contender], policy: SchedulerPolicy, now_unix_s: float) -> Contender:
    """Remove and return who is to be placed next. There must be one."""
    chosen = min(contenders, key=lambda each: _order(each, policy, now_unix_s))
    contenders.remove(chosen)
    return chosen


def _order(
    contender: Contender, policy: SchedulerPolicy, now_unix_s: float
) -> tuple[int, bool, float, float, ModelName]:
    want = contender.want
    has_waited = want.urgency is Urgency.INTERACTIVE
    overdue = has_waited and now_unix_s - want.since_unix_s >= policy.patience_s
    first = want.since_unix_s if overdue else -regret_s(contender.options, want.jobs)
    return (-want.urgency, not overdue, first, want.since_unix_s, want.model.name)


def regret_s(options: Iterable[Option], jobs: int) -> float:
    """Return the seconds that all waiting jobs together lose if the best place is taken."""
    best, second = None, None
    for option in options:
        if best is None:
            best = option
        elif second is None and not (best.touches & option.touches):
            second = option
    if best is None:
        return 0.0
    loss_s = NOWHERE_S if second is None else min(NOWHERE_S, second.score - best.score)
    return max(1, min(jobs, _MOST_JOBS)) * max(0.0, loss_s)
