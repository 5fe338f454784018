"""What waits for a model behind the replicas that it has: when it begins, and when they idle.

Waiting jobs go to their model's own replicas first: each free slot takes the next one, as routers'
queues are served. So the work ahead is counted in tokens at the speed that replicas measured:

    a job runs for      answer tokens x seconds of a step, at most
    a prompt holds up   all that runs on its replica, for prompt tokens x seconds of one

A replica that is still starting has its slots when it was predicted to be ready.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import NamedTuple

from gearfall.core.records import ReplicaRecord
from gearfall.scheduling.placement.work_ahead import UNKNOWN_STEP_S, seconds_left
from gearfall.scheduling.snapshot import Hosted, ReplicaKey, Waiting

COUNTED_JOBS = 64
"""Waiting jobs that are followed one by one; of more, each stands for several."""
SETTLED_S = 1.0
"""After so long a replica has taken what waited for it, or has no room for it."""
_NEVER_S = float("inf")


@dataclass(frozen=True, slots=True)
class QueueAhead:
    """What the jobs that wait for a model may expect of its replicas. Seconds from now."""

    last_begins_s: float
    """Until the last of them begins; infinite where nothing serves them, 0 where nothing waits."""
    idle_in_s: dict[ReplicaKey, float]
    """Until each replica has nothing left to do; infinite where nobody says."""


class _Slot(NamedTuple):
    free_s: float
    """But for what prompts hold it up."""
    number: int
    """Of the replica."""


def queue_ahead(
    replicas: Iterable[Hosted], waiting: Waiting | None, now_unix_s: float
) -> QueueAhead:
    """Serve what waits with a model's replicas, one slot after the other."""
    replicas = tuple(replicas)
    if waiting is None:
        return QueueAhead(0.0, {each.key: ends_in_s(each, now_unix_s) for each in replicas})
    slots = [
        _Slot(free_s, number)
        for number, each in enumerate(replicas)
        for free_s in _slots_free_in(each, now_unix_s)
    ]
    token_s = _prompt_token_s(replicas)
    held_up_s = [_prompts_s(each, token_s) for each in replicas]
    last_s = _serve(slots, held_up_s, waiting, (token_s, _step_s(replicas)))
    idle = [0.0] * len(replicas)
    for slot in slots:
        if slot.free_s > 0.0:
            idle[slot.number] = max(idle[slot.number], slot.free_s + held_up_s[slot.number])
    return QueueAhead(last_s, {each.key: idle[n] for n, each in enumerate(replicas)})


def up_in_s(hosted: Hosted, now_unix_s: float) -> float:
    """Return when a replica takes jobs: 0 when it does, infinite when nobody predicted it.

    One that is late is taken to be late by as much again: it is looked at less and less often.
    """
    if hosted.is_ready:
        return 0.0
    assignment = hosted.assignment
    if assignment.predicted_start_s <= 0.0:
        return _NEVER_S
    return abs(assignment.assigned_unix_s + assignment.predicted_start_s - now_unix_s)


def ends_in_s(hosted: Hosted, now_unix_s: float) -> float:
    """Return when a replica for which nothing waits has nothing left to do."""
    if hosted.replica is None or not hosted.is_ready:
        return up_in_s(hosted, now_unix_s)
    return max(_jobs_end_in_s(hosted.replica, now_unix_s), default=0.0)


def _jobs_end_in_s(replica: ReplicaRecord, now_unix_s: float) -> list[float]:
    """Return when each running job has ended, at most; infinite where nobody says."""
    if replica.running_jobs and not (replica.jobs and replica.step_s):
        return [_NEVER_S] * replica.running_jobs
    return seconds_left(replica, now_unix_s)


def _slots_free_in(hosted: Hosted, now_unix_s: float) -> list[float]:
    """Return when each slot that waiting jobs may get is free.

    Where jobs wait beside free slots, those are not to be had, for want of memory, unless the
    replica has only just become ready.
    """
    replica = hosted.replica
    slots = max(1, replica.slots) if replica else 1
    if replica is None or not hosted.is_ready:
        return [up_in_s(hosted, now_unix_s)] * slots
    taken = _jobs_end_in_s(replica, now_unix_s)[:slots]
    ready_unix_s = hosted.assignment.assigned_unix_s + hosted.start_s
    is_new = now_unix_s < ready_unix_s + SETTLED_S
    return [0.0] * (slots - len(taken)) * is_new + taken


def _serve(
    slots: list[_Slot], held_up_s: list[float], waiting: Waiting, speed_s: tuple[float, float]
) -> float:
    """Give each waiting job the slot that is free first; return when the last begins.

    `speed_s`: of a token of a prompt and of an answer.
    """
    if not slots:
        return _NEVER_S
    counted = min(waiting.jobs, COUNTED_JOBS)
    prompt_s = waiting.prompt_tokens * speed_s[0] / counted
    answer_s = waiting.output_tokens * speed_s[1] / counted
    heapify(slots)
    begins_s = 0.0
    for _ in range(counted):
        free_s, number = slots[0]
        begins_s = free_s + held_up_s[number] if free_s > 0.0 else 0.0
        held_up_s[number] += prompt_s
        heapreplace(slots, _Slot(free_s + answer_s, number))
    return begins_s


def _prompts_s(hosted: Hosted, token_s: float) -> float:
    """Return the seconds of prompts that a replica has taken and not computed yet."""
    jobs = hosted.replica.jobs if hosted.replica else ()
    return token_s * sum(job.prompt_tokens for job in jobs if not job.output_tokens)


def _step_s(replicas: tuple[Hosted, ...]) -> float:
    known = [each.replica.step_s for each in replicas if each.replica and each.replica.step_s]
    return max(known, default=UNKNOWN_STEP_S)


def _prompt_token_s(replicas: tuple[Hosted, ...]) -> float:
    """Return what a token of a prompt takes, for which stands what a moved one does."""
    return max((each.replica.move_s_per_token for each in replicas if each.replica), default=0.0)
