"""How long running work takes: to end, or to move elsewhere.

ServerlessLLM (arXiv 2401.14351), section 6.2: moving a job takes a * (t_in + t_out) + b, with t_out
as its worker said it last, carried on to now by the length of a decode step.
"""

from gearfall.core.records import ReplicaRecord, RunningJob

UNKNOWN_STEP_S = 0.05
UNKNOWN_MOVE_FIXED_S = 0.05
UNKNOWN_MOVE_S_PER_TOKEN = 3e-4
"""All three assumed until a replica has measured its own."""
MOVED_AT_ONCE = 4
"""Jobs that a worker moves side by side."""


def step_s(replica: ReplicaRecord) -> float:
    """Return the seconds of a decode step on a replica."""
    return replica.step_s or UNKNOWN_STEP_S


def tokens_out(job: RunningJob, replica: ReplicaRecord, now_unix_s: float) -> float:
    """Return how many tokens a job has produced by now, at most all it may."""
    made = _since_s(replica, now_unix_s) / step_s(replica)
    return min(float(job.max_tokens), job.output_tokens + made)


def seconds_left(replica: ReplicaRecord, now_unix_s: float) -> list[float]:
    """Return how long each job still runs, at most: it may stop before its limit.

    One that is late is taken to be late by as much again: it is looked at less and less often.
    """
    since_s, each_s = _since_s(replica, now_unix_s), step_s(replica)
    return [abs((job.max_tokens - job.output_tokens) * each_s - since_s) for job in replica.jobs]


def _since_s(replica: ReplicaRecord, now_unix_s: float) -> float:
    """Return the seconds since a replica said what runs on it."""
    return max(0.0, now_unix_s - replica.seen_unix_s) if replica.seen_unix_s else 0.0


def idle_in_s(replica: ReplicaRecord, now_unix_s: float) -> float:
    """Return when the last of the jobs that run now has ended, at most; 0 for an idle replica."""
    return max(seconds_left(replica, now_unix_s), default=0.0)


def moving_s(replica: ReplicaRecord, now_unix_s: float) -> float:
    """Return how long all jobs of a replica take to move, some side by side."""
    is_measured = replica.move_s_per_token > 0 or replica.move_fixed_s > 0
    each_s = replica.move_fixed_s if is_measured else UNKNOWN_MOVE_FIXED_S
    per_token_s = replica.move_s_per_token if is_measured else UNKNOWN_MOVE_S_PER_TOKEN
    tokens = [job.prompt_tokens + tokens_out(job, replica, now_unix_s) for job in replica.jobs]
    spent_s = [each_s + per_token_s * count for count in tokens]
    return max(max(spent_s, default=0.0), sum(spent_s) / MOVED_AT_ONCE)
