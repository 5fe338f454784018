"""What waits for one model at one router, counted as jobs come and go."""

from dataclasses import dataclass, field

from gearfall.core.generation.job import Job, Priority
from gearfall.core.ids import JobId

_MUCH = 0.25
_MUCH_S = 1.0


@dataclass(frozen=True, slots=True)
class Backlog:
    """Unclaimed jobs of one model. The empty one says that none waits."""

    jobs: int = 0
    since_unix_s: float = 0.0
    """When the oldest of them began to wait."""
    prompt_tokens: int = 0
    """To prefill for all of them, with what was generated before they lost their owner."""
    output_tokens: int = 0
    """That they may yet produce at most."""
    batch_jobs: int = 0
    """Of the jobs, those of batch priority."""
    interactive_since_unix_s: float = 0.0
    """When the oldest of the others began to wait; 0 for none."""


@dataclass(frozen=True, slots=True)
class _Need:
    since_unix_s: float
    prompt_tokens: int
    output_tokens: int
    is_batch: bool


@dataclass(slots=True)
class WaitingJobs:
    """Owner of the waiting jobs of one model, in the order they began to wait."""

    _needs: dict[JobId, _Need] = field(default_factory=dict)
    _prompt_tokens: int = 0
    _output_tokens: int = 0
    _batch_jobs: int = 0
    _interactive_since: dict[JobId, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._needs)

    def __contains__(self, job_id: JobId) -> bool:
        return job_id in self._needs

    def job_ids(self) -> tuple[JobId, ...]:
        """Return who waits, the longest first."""
        return tuple(self._needs)

    def add(self, job: Job, generated_tokens: int, now_unix_s: float) -> bool:
        """Count a job that begins to wait; False when it did already."""
        if job.job_id in self._needs:
            return False
        left = max(0, job.sampling.max_tokens - generated_tokens)
        prompt_tokens = len(job.prompt_token_ids) + generated_tokens
        is_batch = job.priority is Priority.BATCH
        self._needs[job.job_id] = _Need(now_unix_s, prompt_tokens, left, is_batch)
        self._prompt_tokens += prompt_tokens
        self._output_tokens += left
        self._batch_jobs += is_batch
        if not is_batch:
            self._interactive_since[job.job_id] = now_unix_s
        return True

    def discard(self, job_id: JobId) -> bool:
        """Count a job no more; False when it did not wait."""
        need = self._needs.pop(job_id, None)
        if need is None:
            return False
        self._prompt_tokens -= need.prompt_tokens
        self._output_tokens -= need.output_tokens
        self._batch_jobs -= need.is_batch
        self._interactive_since.pop(job_id, None)
        return True

    def backlog(self) -> Backlog:
        """Return what waits now."""
        if not self._needs:
            return Backlog()
        oldest = next(iter(self._needs.values()))
        return Backlog(
            len(self._needs),
            oldest.since_unix_s,
            self._prompt_tokens,
            self._output_tokens,
            self._batch_jobs,
            next(iter(self._interactive_since.values()), 0.0),
        )

    def check(self) -> None:
        """Assert that the sums are those of the jobs."""
        needs = self._needs.values()
        assert self._prompt_tokens == sum(need.prompt_tokens for need in needs)
        assert self._output_tokens == sum(need.output_tokens for need in needs)
        assert self._batch_jobs == sum(need.is_batch for need in needs)
        assert len(self._interactive_since) == len(self._needs) - self._batch_jobs


def has_changed_much(said: Backlog, now: Backlog) -> bool:
    """Whether the scheduler has to be told anew: a quarter more or less, or another oldest job."""
    pairs = (
        (said.jobs, now.jobs),
        (said.batch_jobs, now.batch_jobs),
        (said.prompt_tokens, now.prompt_tokens),
        (said.output_tokens, now.output_tokens),
    )
    if any(abs(after - before) > _MUCH * before for before, after in pairs):
        return True
    return now.since_unix_s - said.since_unix_s >= _MUCH_S
