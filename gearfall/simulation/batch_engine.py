"""Continuous batching in token time: prompts one after the other, then all jobs step together.

A decode step gives every running job one token and takes `step_s + step_s_per_job * (jobs - 1)`.
While a prompt is computed nobody steps. Progress between two events is a straight line, so that an
answer of a thousand tokens costs two events and not a thousand.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush

from gearfall.simulation.agenda import Agenda
from gearfall.simulation.requests import Job
from gearfall.simulation.site import EngineSpeed

_EPSILON_TOKENS = 1e-6


@dataclass(frozen=True, slots=True)
class _Seat:
    """A job that decodes: where the engine's token count was when it joined."""

    job: Job
    joined_at: float
    done_before: float

    @property
    def ends_at(self) -> float:
        return self.joined_at + self.job.work.output_tokens - self.done_before


@dataclass(frozen=True, slots=True)
class _Prefill:
    job: Job
    tokens: int
    then: Callable[[], None]


class BatchEngine:
    """Owner of what one replica computes."""

    def __init__(
        self, speed: EngineSpeed, agenda: Agenda, on_finished: Callable[[Job], None]
    ) -> None:
        self.speed = speed
        self._agenda = agenda
        self._on_finished = on_finished
        self._seats: dict[str, _Seat] = {}
        self._ends: list[tuple[float, str]] = []
        self._prefills: deque[_Prefill] = deque()
        self._prefill_end_s = 0.0
        self._tokens = 0.0
        self._seen_s = agenda.now_s
        self._plan_number = 0

    @property
    def step_s(self) -> float:
        """Of one decode step now."""
        return self.speed.step_s + self.speed.step_s_per_job * max(0, len(self._seats) - 1)

    def begin(self, job: Job) -> None:
        """Compute a job's prompt and what it has of its answer, then let it run."""
        self.prefill(job, job.context_tokens, partial(self._first_token, job))

    def prefill(self, job: Job, tokens: int, then: Callable[[], None]) -> None:
        """Compute `tokens` for a job in turn, then call."""
        self.advance()
        self._prefills.append(_Prefill(job, tokens, then))
        if len(self._prefills) == 1:
            self._begin_prefill()
        self._plan()

    def seat(self, job: Job) -> None:
        """Let a job whose context is computed run from where it is."""
        self.advance()
        seat = _Seat(job, self._tokens, job.done_tokens)
        self._seats[job.job_id] = seat
        heappush(self._ends, (seat.ends_at, job.job_id))
        self._plan()

    def remove(self, job: Job) -> None:
        """Stop a job; its progress is in `job.done_tokens`."""
        self.advance()
        self._seats.pop(job.job_id, None)
        was_first = self._prefills and self._prefills[0].job is job
        self._prefills = deque(p for p in self._prefills if p.job is not job)
        if was_first and self._prefills:
            self._begin_prefill()
        self._plan()

    def _first_token(self, job: Job) -> None:
        if job.done_tokens < 1.0:
            job.done_tokens = 1.0
            job.first_token_s = self._agenda.now_s
        self.seat(job)

    def _begin_prefill(self) -> None:
        spent_s = self._prefills[0].tokens * self.speed.prefill_s_per_token
        self._prefill_end_s = self._agenda.now_s + spent_s

    def advance(self) -> None:
        """Bring everybody's progress up to now."""
        now_s = self._agenda.now_s
        if not self._prefills and self._seats:
            self._tokens += (now_s - self._seen_s) / self.step_s
            for seat in self._seats.values():
                done = seat.done_before + self._tokens - seat.joined_at
                seat.job.done_tokens = min(done, seat.job.work.output_tokens)
        self._seen_s = now_s

    def _plan(self) -> None:
        """Plan the next thing that happens here; what was planned before no longer does."""
        self._plan_number += 1
        while self._ends and self._stale(*self._ends[0]):
            heappop(self._ends)
        if self._prefills:
            when_s = self._prefill_end_s
        elif self._ends:
            when_s = self._seen_s + max(0.0, self._ends[0][0] - self._tokens) * self.step_s
        else:
            return
        self._agenda.at(max(when_s, self._agenda.now_s), partial(self._tick, self._plan_number))

    def _stale(self, ends_at: float, job_id: str) -> bool:
        seat = self._seats.get(job_id)
        return seat is None or seat.ends_at != ends_at

    def _tick(self, plan_number: int) -> None:
        if plan_number != self._plan_number:
            return
        self.advance()
        if self._prefills:
            done = self._prefills.popleft()
            if self._prefills:
                self._begin_prefill()
            done.then()
        else:
            self._finish_due()
        self._plan()

    def _finish_due(self) -> None:
        while self._ends and (
            self._stale(*self._ends[0]) or self._ends[0][0] <= self._tokens + _EPSILON_TOKENS
        ):
            _, job_id = heappop(self._ends)
            seat = self._seats.get(job_id)
            if seat is not None and seat.ends_at <= self._tokens + _EPSILON_TOKENS:
                del self._seats[job_id]
                seat.job.done_tokens = seat.job.work.output_tokens
                self._on_finished(seat.job)
