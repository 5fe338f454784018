"""Who gets which place where several models want the same ones: the least loss over all together.

A min-cost assignment (the Hungarian method): each model to one of its places, at the predicted
seconds of that place times the jobs that wait, or to none, at the seconds until its own replicas
have begun all that waits, at a fixed price where it has none; both grow with how long it has
waited. Those who have waited out their patience go before all others, the longest wait first, so
that nobody is passed over for ever. See docs/decisions/0016 and 0019.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from gearfall.core.ids import WorkerId
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.placement.options import Option
from gearfall.scheduling.placement.placement_search import Search
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy

NOWHERE_S = 60.0
"""What having no place, and no replica that will serve it, counts as."""
ALIKE_S = 0.05
"""What a place may take longer than the best one and still be as good."""
_CROWDED_S = 1e4
_NEVER_S = 1e9
_NEVER_WAITED_S = float("inf")
_MOST_JOBS = 16
"""Waiting jobs that count; beyond, one model's queue would outweigh everybody else."""
_MOST_PLACES = 4
"""Of one worker, that one choice gives away; what is beyond goes in the next."""


@dataclass(slots=True, eq=False)
class Contender:
    """A want with the places that are left for it, best first."""

    want: Want
    options: list[Option]
    search: Search | None = None
    """All workers as they were looked at for the options; None where only some were."""
    behind_s: float = _NEVER_WAITED_S
    """Until its own replicas have begun all that waits; infinite where it has none."""
    is_promised: bool = False
    """Whether they do so as soon as was said before: no other place was looked for."""
    is_limited: bool = False
    """Whether only some workers were looked at."""

    @property
    def is_served(self) -> bool:
        """Whether its own replicas begin what waits sooner than a new one could."""
        return self.is_promised or bool(self.options and self.behind_s <= self.options[0].score)


def choose_together(
    contenders: Sequence[Contender], policy: SchedulerPolicy, now_unix_s: float
) -> list[tuple[Contender, Option | None]]:
    """Return who is served now with which option; those left out choose again afterwards.

    At least one is returned, of the most urgent only; None for one that nothing can be had for.
    """
    urgency = max(each.want.urgency for each in contenders)
    first = [each for each in contenders if each.want.urgency is urgency]
    overdue = [each for each in first if _is_overdue(each.want, policy, now_unix_s)]
    if overdue:
        first = [min(overdue, key=lambda each: (each.want.since_unix_s, each.want.model.name))]
    # What an estimate promises is believed until patience ends.
    served = [] if overdue else [each for each in first if each.is_served]
    without = [(each, None) for each in first if not each.options or each in served]
    first = [each for each in first if each.options and each not in served]
    if len(first) <= 1 or any(len(each.options[0].workers) > 1 for each in first):
        # Groups are chosen one by one: a group's place is not a column of its own.
        return [*without, *((each, each.options[0]) for each in first[:1])]
    return [*without, *_assign(first, now_unix_s)]


def _is_overdue(want: Want, policy: SchedulerPolicy, now_unix_s: float) -> bool:
    has_waited = now_unix_s - want.since_unix_s >= policy.patience_s
    return want.urgency is Urgency.INTERACTIVE and has_waited


def _assign(
    contenders: list[Contender], now_unix_s: float
) -> list[tuple[Contender, Option | None]]:
    columns: dict[tuple[WorkerId, int], int] = {}
    for contender in contenders:
        for option in contender.options:
            for place in range(min(option.places, _MOST_PLACES)):
                columns.setdefault((option.workers[0], place), len(columns))
    loss_s = np.full((len(contenders), len(columns) + len(contenders)), _NEVER_S)
    for row, contender in enumerate(contenders):
        jobs = max(1, min(contender.want.jobs, _MOST_JOBS))
        waited_s = max(0.0, now_unix_s - contender.want.since_unix_s)
        none_s = min(NOWHERE_S, contender.behind_s) + waited_s
        loss_s[row, len(columns) + row] = jobs * none_s
        for option in contender.options:
            price_s = jobs * (option.score + _CROWDED_S * option.is_crowded)
            for place in range(min(option.places, _MOST_PLACES)):
                loss_s[row, columns[option.workers[0], place]] = price_s
    _, chosen = linear_sum_assignment(loss_s)
    workers = {number: worker_id for (worker_id, _), number in columns.items()}
    found: list[tuple[Contender, Option | None]] = []
    for contender, column in zip(contenders, chosen.tolist(), strict=True):
        taken = [o for o in contender.options if o.workers[0] == workers.get(column)]
        if taken:
            found.append((contender, taken[0]))
    if found:
        return _best_first(found)
    # Where every place costs more than none, somebody goes on all the same.
    served = [each for each in contenders if each.behind_s < NOWHERE_S]
    return [(each, None) for each in served] or [(contenders[0], contenders[0].options[0])]


def _best_first(
    found: list[tuple[Contender, Option | None]],
) -> list[tuple[Contender, Option | None]]:
    """Return those that got what is best for them: others may find better once these have theirs.

    The worker that one of them is second on may have room for both, when somebody idle goes or
    soon ends; that is seen only when the first one has its place.
    """
    settled = [each for each in found if each[1] and _is_best(each[0], each[1])]
    return settled or found


def _is_best(contender: Contender, option: Option) -> bool:
    best = contender.options[0]
    return option.is_crowded == best.is_crowded and option.score <= best.score + ALIKE_S
