"""What a replica's record says of its jobs: which run, how fast, and when it is told."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

from gearfall.core.records import RunningJob
from services.worker.engine_link.messages import StepDone
from services.worker.jobs.claims import Claim

KEPT_STEPS = 33
NEWS_INTERVAL_S = 1.0
KV_STEP = 0.1
"""Change of the KV cache's use that is told before the next news is due."""
KV_INTERVAL_S = 0.25


def running_jobs(claims: Iterable[Claim]) -> tuple[RunningJob, ...]:
    """Return what the scheduler has to know of the claims that run."""
    return tuple(
        RunningJob(
            job_id=claim.job.job_id,
            prompt_tokens=len(claim.job.prompt_token_ids),
            output_tokens=claim.next_index,
            max_tokens=claim.job.sampling.max_tokens,
            priority=claim.job.priority,
        )
        for claim in claims
    )


class RecentSteps:
    """Owner of the newest times of an engine's steps. Pure."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=KEPT_STEPS)
        self.slowdown = 0.0
        """How much longer they take lately than they did at their best; 0 while unknown."""

    def note(self, step: StepDone) -> None:
        """Take a step in; one that brought no token says nothing about decoding."""
        self.slowdown = round(step.slowdown, 2)
        if any(run.token_ids for run in step.runs):
            times_s = (*step.earlier_step_s, step.step_s)
            self._seconds.extend(each for each in times_s if each > 0)

    @property
    def step_s(self) -> float:
        """The median, which a prefill among them does not move; 0 while unknown."""
        return median(self._seconds) if self._seconds else 0.0


class KvShare:
    """Owner of how full the KV cache is, as the newest step says; told by steps of `KV_STEP`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` counts seconds, monotonic."""
        self._clock = clock
        self._share = 0.0
        self._told = 0.0
        self._told_s = -KV_INTERVAL_S

    def note(self, step: StepDone) -> bool:
        """Take a step in; return whether it is to be told before anything else happens."""
        if step.kv_blocks > 0:
            self._share = step.kv_used_blocks / step.kv_blocks
        is_news = abs(self._share - self._told) >= KV_STEP
        return is_news and self._clock() - self._told_s >= KV_INTERVAL_S

    def tell(self, *, is_idle: bool = False) -> float:
        """Return the share, which is told now; without a job it is 0, until the next step."""
        if is_idle:
            self._share = 0.0
        self._told, self._told_s = self._share, self._clock()
        return round(self._share, 3)


class JobNews:
    """Has a replica's jobs told again: soon after they changed, never twice within the interval."""

    def __init__(
        self,
        tell: Callable[[], None],
        clock: Callable[[], float],
        *,
        interval_s: float = NEWS_INTERVAL_S,
    ) -> None:
        """`tell` is called on the event loop; `clock` counts seconds, monotonic."""
        self._tell = tell
        self._clock = clock
        self._interval_s = interval_s
        self._told_s = -interval_s
        self._timer: asyncio.TimerHandle | None = None

    def jobs_changed(self) -> None:
        """Jobs began or ended: tell as soon as the interval is over, at once if it is."""
        if self._timer is None:
            wait_s = max(0.0, self._told_s + self._interval_s - self._clock())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._fire)

    def jobs_advanced(self) -> None:
        """A step brought tokens: tell if that is due."""
        if self._timer is None and self._clock() - self._told_s >= self._interval_s:
            self._fire()

    def stop(self) -> None:
        """Tell nothing more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._told_s = self._clock()
        self._tell()
