"""How long running and waiting work takes: to end, to give a slot free, to move elsewhere.

ServerlessLLM (arXiv 2401.14351), section 6.2: moving a job takes a * (t_in + t_out) + b, with t_out
as its worker said it last, carried on to now by the length of a decode step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gearfall.core.records import ReplicaRecord, RunningJob

UNKNOWN_STEP_S = 0.05
UNKNOWN_MOVE_FIXED_S = 0.05
UNKNOWN_MOVE_S_PER_TOKEN = 3e-4
"""All three assumed until a replica has measured its own."""
MOVED_AT_ONCE = 4
"""Jobs that a worker moves side by side."""
PREFILL_SPEEDUP = 8.0
"""Prompt tokens computed in the time of one decoded token, at least; they go in batches."""


@dataclass(frozen=True, slots=True)
class MoveEstimate:
    """Expected time to move a replica's jobs away."""

    jobs: int
    tokens: float
    """Of all jobs, prompt and answer, at the time of asking."""
    total_s: float
    is_measured: bool

    def terms(self) -> str:
        """Return the sum in words and numbers."""
        origin = "measured" if self.is_measured else "assumed"
        return (
            f"{self.total_s:.2f} s to move {self.jobs} jobs of {self.tokens:.0f} tokens ({origin})"
        )


def step_s(replica: ReplicaRecord) -> float:
    """Return the seconds of a decode step on a replica."""
    return replica.step_s or UNKNOWN_STEP_S


def tokens_out(job: RunningJob, replica: ReplicaRecord, now_unix_s: float) -> float:
    """Return how many tokens a job has produced by now, at most all it may."""
    since_s = max(0.0, now_unix_s - replica.seen_unix_s) if replica.seen_unix_s else 0.0
    return min(float(job.max_tokens), job.output_tokens + since_s / step_s(replica))


def seconds_left(job: RunningJob, replica: ReplicaRecord, now_unix_s: float) -> float:
    """Return how long a job still runs, at most: it may stop before its limit."""
    return (job.max_tokens - tokens_out(job, replica, now_unix_s)) * step_s(replica)


def idle_in_s(replica: ReplicaRecord, now_unix_s: float) -> float:
    """Return when the last of the jobs that run now has ended, at most; 0 for an idle replica."""
    return max((seconds_left(job, replica, now_unix_s) for job in replica.jobs), default=0.0)


def slot_in_s(replica: ReplicaRecord, now_unix_s: float) -> float:
    """Return when a slot is free, at most; 0 where one is."""
    if replica.running_jobs < replica.slots:
        return 0.0
    return min((seconds_left(job, replica, now_unix_s) for job in replica.jobs), default=0.0)


def move_estimate(replica: ReplicaRecord, now_unix_s: float) -> MoveEstimate:
    """Return how long all jobs of a replica take to move, some side by side."""
    is_measured = replica.move_s_per_token > 0 or replica.move_fixed_s > 0
    each_s = replica.move_fixed_s if is_measured else UNKNOWN_MOVE_FIXED_S
    per_token_s = replica.move_s_per_token if is_measured else UNKNOWN_MOVE_S_PER_TOKEN
    tokens = [job.prompt_tokens + tokens_out(job, replica, now_unix_s) for job in replica.jobs]
    spent_s = [each_s + per_token_s * count for count in tokens]
    total_s = max(max(spent_s, default=0.0), sum(spent_s) / MOVED_AT_ONCE)
    return MoveEstimate(len(tokens), math.fsum(tokens), total_s, is_measured)


def queue_wait_s(
    replicas: Iterable[ReplicaRecord],
    now_unix_s: float,
    *,
    prompt_tokens: int,
    output_tokens: int,
) -> float:
    """Return how long waiting work takes to be computed behind what runs, at most.

    `prompt_tokens`, `output_tokens`: of the waiting jobs; the answers at their longest. The work
    ahead counts in tokens, over the slots of all ready replicas. Infinite without a replica.
    """
    work_s = slots = 0.0
    slowest_s = 0.0
    for replica in replicas:
        work_s += sum(seconds_left(job, replica, now_unix_s) for job in replica.jobs)
        slots += replica.slots
        slowest_s = max(slowest_s, step_s(replica))
    if not slots:
        return math.inf
    waiting = output_tokens + prompt_tokens / PREFILL_SPEEDUP
    return (work_s + waiting * slowest_s) / slots
