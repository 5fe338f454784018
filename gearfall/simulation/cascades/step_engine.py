"""Continuous batching step by step: decodes and prompts share each step, replicas share cores.

    step:  one token of every job that decodes, and prompts in the order of arrival, up to
           `STEP_TOKENS` in all; it takes as long as so many tokens take (`StepSpeed`), and what
           each job that begins in it costs beside its tokens
    cores: of n replicas that compute on c cores, each has min(1, c / n) of one, and gets that much
       done by the time that it is slow; who has to be woken for a job, to take it and to hand over
       its end, waits for one that is taken (`wake_s`)

Steps that are all alike are one event: an answer of a thousand tokens costs as many events as jobs
come and go meanwhile. A job that comes waits for the end of the running step.

A job that may be stopped goes on until somebody hears of the token that says so, and no further:
tokens that may wait are told with an end, or when the oldest has waited its time (`Telling`).
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import ceil

from gearfall.simulation.agenda import Agenda
from gearfall.simulation.cascades.telling import Telling
from gearfall.simulation.requests import Job

STEP_TOKENS = 256
"""Most tokens of a step, as in the worker's engine."""
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class StepSpeed:
    """What one replica of a model takes on a core of its own."""

    steps: tuple[tuple[int, float], ...]
    """(tokens, seconds) of steps, by rising tokens; between them times lie on straight lines."""
    prefill_s_per_token: float
    """Of each token beyond the largest of `steps`."""
    job_s: float = 0.0
    """Computing for a job beside its tokens: claiming it, handing it over, ending it."""
    request_s: float = 0.0
    """On the way of a job while nobody computes: router, queue, streams."""
    wake_s: float = 0.0
    """While somebody does: until who was woken to take a job, or to hand over its last token, has
    the core."""
    tell_s: float = 0.0
    """Of a step, what telling its tokens takes; nothing while they may wait to be told together."""

    def step_s(self, tokens: float) -> float:
        """Return how long a step of so many tokens takes; a mean number may be broken."""
        sizes = [size for size, _ in self.steps]
        place = bisect_left(sizes, tokens)
        if place == len(sizes):
            most, seconds = self.steps[-1]
            return seconds + (tokens - most) * self.prefill_s_per_token
        if place == 0:
            return self.steps[0][1]
        (few, low_s), (many, high_s) = self.steps[place - 1 : place + 1]
        return low_s + (high_s - low_s) * (tokens - few) / (many - few)

    def check(self) -> None:
        """Assert that steps of more tokens are larger and take some time."""
        assert self.steps
        assert all(few[0] < many[0] for few, many in pairwise(self.steps))
        assert all(size >= 1 and seconds > 0.0 for size, seconds in self.steps)
        assert min(self.prefill_s_per_token, self.job_s, self.request_s, self.wake_s) >= 0.0
        assert 0.0 <= self.tell_s < min(seconds for _, seconds in self.steps)


@dataclass(slots=True)
class Cores:
    """Owner of what is shared by the replicas of one worker."""

    count: int = 1
    busy: "list[StepEngine]" = field(default_factory=list)
    slowness: float = 1.0
    """How many times as long as its `StepSpeed` says whatever is computed here takes now."""

    @property
    def share(self) -> float:
        """Of a core that each busy replica has."""
        return min(1.0, self.count / max(1, len(self.busy)))

    @property
    def pace(self) -> float:
        """Seconds of work that each busy replica gets done in a second."""
        return self.share / self.slowness

    def slow_down(self, slowness: float) -> None:
        """Compute at another pace from now on."""
        for each in self.busy:
            each.advance()
        self.slowness = slowness
        for each in self.busy:
            each.replan()

    def change(self, engine: "StepEngine", *, is_busy: bool) -> None:
        """Note that a replica begins or ends computing; all others go on at their new pace."""
        if is_busy == (engine in self.busy):
            return
        for each in self.busy:
            each.advance()
        if is_busy:
            self.busy.append(engine)
        else:
            self.busy.remove(engine)
        for each in self.busy:
            if each is not engine:
                each.replan()


@dataclass(slots=True)
class _Running:
    job: Job
    prompt_left: int
    tokens_left: int
    stop_left: int | None
    """Tokens until it may be stopped, 0 as soon as it may be; None: it may not."""

    @property
    def alike(self) -> int:
        """Steps until something about it is another."""
        return min(self.tokens_left, self.stop_left or self.tokens_left)


class StepEngine:
    """Owner of the jobs that one replica runs."""

    def __init__(
        self,
        speed: StepSpeed,
        agenda: Agenda,
        on_finished: Callable[[Job], None],
        cores: Cores | None = None,
        may_stop: Callable[[Job], bool] = lambda _: True,
    ) -> None:
        """`may_stop` is asked when it is told that a job came to its `stop_tokens`, and again at
        twice as many if it may not."""
        speed.check()
        self.speed = speed
        self.used_s = 0.0
        """Of a core, so far."""
        self._agenda = agenda
        self._on_finished = on_finished
        self._may_stop = may_stop
        self._telling = Telling()
        self._cores = cores or Cores()
        self._jobs: dict[str, _Running] = {}
        self._coming: deque[Job] = deque()
        """That begin with the next step."""
        self._chunks: dict[str, int] = {}
        """Tokens of each job in a step of the running block."""
        self._step_s = 0.0
        self._steps = 0
        self._work_s = 0.0
        """Left of the block, at full pace."""
        self._began_s = self._seen_s = agenda.now_s
        self._plan_number = 0

    def begin(self, job: Job) -> float:
        """Take a job in after what it spends on its way; return that, in seconds."""
        way_s = self.speed.request_s + self._wake_s
        self._agenda.after(way_s, partial(self._come, job))
        return way_s

    @property
    def _wake_s(self) -> float:
        return self.speed.wake_s if self._cores.busy else 0.0

    def _come(self, job: Job) -> None:
        self._coming.append(job)
        if self._steps:
            self._shorten()
        else:
            self._next_block()

    def advance(self) -> None:
        """Bring the running block up to now at the pace that it had."""
        if self._steps:
            passed_s = self._agenda.now_s - self._seen_s
            self._work_s -= passed_s * self._cores.pace
            self.used_s += passed_s * self._cores.share
        self._seen_s = self._agenda.now_s

    def replan(self) -> None:
        """Plan the end of the running block at the pace that it has now."""
        self._plan_number += 1
        after_s = max(0.0, self._work_s) / self._cores.pace
        self._agenda.after(after_s, partial(self._block_ends, self._plan_number))

    def _shorten(self) -> None:
        """End the block with the step that runs."""
        if self._steps == 1:
            return
        self.advance()
        done = max(1, ceil(self._steps - self._work_s / self._step_s - _EPSILON))
        if done < self._steps:
            self._work_s -= (self._steps - done) * self._step_s
            self._steps = done
            self.replan()

    def _next_block(self) -> None:
        """Begin the steps up to the next job's end, or one step where a prompt is computed."""
        begun_s = 0.0
        while self._coming:
            job = self._coming.popleft()
            # What is told together is told at least once.
            begun_s += self.speed.job_s + (self.speed.tell_s if job.work.gather_s > 0 else 0.0)
            work, done = job.work, int(job.done_tokens)
            stop_left = max(1, work.stop_tokens - done) if work.stop_tokens else None
            left = work.output_tokens - done
            self._jobs[job.job_id] = _Running(job, job.context_tokens, left, stop_left)
        if not self._jobs:
            self._cores.change(self, is_busy=False)
            return
        self._cores.change(self, is_busy=True)
        self._chunks = self._shared_out()
        told_s = 0.0 if self._gather_s() > 0.0 else self.speed.tell_s
        self._step_s = self.speed.step_s(sum(self._chunks.values())) - self.speed.tell_s + told_s
        self._began_s = self._seen_s = self._agenda.now_s
        self._steps = self._alike()
        self._work_s = begun_s + self._steps * self._step_s
        self.replan()

    def _alike(self) -> int:
        """Return how many steps from now on are the same."""
        running = self._jobs.values()
        if any(one.prompt_left for one in running):
            return 1
        steps = min(one.alike for one in running)
        if any(one.stop_left == 0 for one in running):
            step_s = self._step_s / self._cores.pace
            steps = min(steps, self._telling.steps_until(self._seen_s, step_s, self._gather_s()))
        return steps

    def _gather_s(self) -> float:
        """Return how long what the running block's steps bring may wait."""
        chunks = self._chunks.items()
        bringing = [self._jobs[name] for name, count in chunks if count >= self._prompt_left(name)]
        return min((one.job.work.gather_s for one in bringing), default=0.0)

    def _prompt_left(self, name: str) -> int:
        return self._jobs[name].prompt_left

    def _shared_out(self) -> dict[str, int]:
        """Return how many tokens of each job the next step computes."""
        chunks = {name: 1 for name, one in self._jobs.items() if not one.prompt_left}
        room = STEP_TOKENS - len(chunks)
        for name, one in self._jobs.items():
            if one.prompt_left and room > 0:
                chunks[name] = min(one.prompt_left, room)
                room -= chunks[name]
        return chunks

    def _block_ends(self, plan_number: int) -> None:
        if plan_number != self._plan_number:
            return
        self.advance()
        steps, self._steps = self._steps, 0
        self._work_s = 0.0
        step_s, gather_s = (self._agenda.now_s - self._began_s) / steps, self._gather_s()
        is_told = self._telling.pass_steps(self._began_s, steps, step_s, gather_s)
        ended = [self._jobs[name] for name in self._chunks if self._has_ended(name, steps)]
        if ended:
            self._telling.tell()
        for one in ended:
            del self._jobs[one.job.job_id]
        if ended or is_told:
            ended += self._stopped()
        self._next_block()
        wake_s = self._wake_s
        for one in ended:
            if wake_s:
                self._agenda.after(wake_s, partial(self._on_finished, one.job))
            else:
                self._on_finished(one.job)

    def _has_ended(self, name: str, steps: int) -> bool:
        """Note a job's progress in the block; return whether it was its last."""
        one = self._jobs[name]
        if one.prompt_left:
            one.prompt_left -= self._chunks[name]
            if one.prompt_left:
                return False
            one.job.first_token_s = one.job.first_token_s or self._agenda.now_s
        one.tokens_left -= steps
        if one.stop_left is not None:
            one.stop_left = max(0, one.stop_left - steps)
        one.job.done_tokens = one.job.work.output_tokens - one.tokens_left
        return one.tokens_left <= 0

    def _stopped(self) -> list[_Running]:
        """Take out who may be stopped, as is known by now."""
        found = []
        for one in [each for each in self._jobs.values() if each.stop_left == 0]:
            if self._may_stop(one.job):
                found.append(self._jobs.pop(one.job.job_id))
            else:
                one.stop_left = max(1, int(one.job.done_tokens))
        return found
