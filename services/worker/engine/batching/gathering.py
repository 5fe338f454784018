"""Steps whose tokens nobody waits for, gathered into one message. Pure.

A job says with `gather_s` how long a token of it may wait for those behind it. What an engine has
to say is held back while everything in it may wait, and told in one piece as soon as one thing may
not: a job's end, a report, a token of a job that gathers nothing, or one whose time would be over
before the next step is.

| a step brings                           | nothing is held back | something is              |
| --------------------------------------- | -------------------- | ------------------------- |
| tokens that can wait for the next step  | held back            | held back, told when due  |
| an end, a report, tokens that can't     | told                 | told behind what was held |
| nothing                                 | told                 | told behind what was held |
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import msgspec

from gearfall.core.generation.job import FinishReason, TokenRun
from services.worker.engine.batching.sequence import SequenceKey
from services.worker.engine_link.messages import (
    CancelJob,
    HoldJob,
    StepDone,
    SubmitJob,
    WorkerMessage,
)

_JOINABLE = frozenset({None, FinishReason.STOP, FinishReason.LENGTH})
"""Ends that count the run's tokens in; after others the tokens before them stay a run."""


class Gathering:
    """Owner of what was computed and not told yet."""

    def __init__(self) -> None:
        self._gather_s: dict[SequenceKey, float] = {}
        """Of jobs that gather."""
        self._held: list[tuple[StepDone, float]] = []
        """Steps and when they ended."""
        self._due_s = math.inf

    def note(self, message: WorkerMessage) -> None:
        """Hear what the worker says about its jobs."""
        if isinstance(message, HoldJob):
            message = message.job
        if isinstance(message, SubmitJob):
            if message.gather_s > 0:
                self._gather_s[message.job_id, message.epoch] = message.gather_s
        elif isinstance(message, CancelJob):
            self._forget((message.job_id, message.epoch))

    def add(self, step: StepDone, now_s: float) -> StepDone | None:
        """Take a step in and return what is to be told now, None for nothing yet.

        Nothing is told while a step is computed, so the next one is taken to last as long as this.
        """
        wait_s = self._wait_s(step)
        if not self._held and wait_s <= step.step_s:
            return step
        self._held.append((step, now_s))
        self._due_s = min(self._due_s, now_s + wait_s)
        return self.take(now_s) if now_s + step.step_s >= self._due_s else None

    def take(self, now_s: float) -> StepDone | None:
        """Return all that was held back; None when nothing was."""
        if not self._held:
            return None
        steps = [step for step, _ in self._held]
        runs = tuple(_joined(self._held, now_s))
        self._held, self._due_s = [], math.inf
        return msgspec.structs.replace(
            steps[-1], runs=runs, earlier_step_s=tuple(step.step_s for step in steps[:-1])
        )

    def check(self) -> None:
        """Assert that nothing is held back for ever, and only of jobs that gather."""
        assert bool(self._held) == math.isfinite(self._due_s)
        held = {(run.job_id, run.epoch) for step, _ in self._held for run in step.runs}
        assert held <= self._gather_s.keys()
        assert all(each > 0 for each in self._gather_s.values())

    def _forget(self, key: SequenceKey) -> None:
        """Tell no token of a cancelled job: its next submission says the same ones again."""
        if self._gather_s.pop(key, None) is None:
            return
        for place, (step, ended_s) in enumerate(self._held):
            runs = tuple(run for run in step.runs if (run.job_id, run.epoch) != key)
            self._held[place] = msgspec.structs.replace(step, runs=runs), ended_s

    def _wait_s(self, step: StepDone) -> float:
        """Return how long a step may wait to be told; forget the jobs that it ends."""
        may_wait = bool(step.runs) and not (step.reports or step.adapters)
        wait_s = math.inf if may_wait else 0.0
        for run in step.runs:
            key = run.job_id, run.epoch
            wait_s = min(wait_s, self._gather_s.get(key, 0.0))
            if run.finish is not None:
                self._gather_s.pop(key, None)
                wait_s = 0.0
        return wait_s


def _joined(held: Iterable[tuple[StepDone, float]], now_s: float) -> Iterable[TokenRun]:
    """Return the runs of all steps in order, those of one job as one where they can be."""
    found: list[TokenRun] = []
    places: dict[SequenceKey, int] = {}
    for step, ended_s in held:
        for run in step.runs:
            key = run.job_id, run.epoch
            place = places.get(key)
            if place is not None and _can_join(found[place], run):
                found[place] = _one(found[place], run)
                continue
            places[key] = len(found)
            found.append(replace(run, held_s=now_s - ended_s) if now_s > ended_s else run)
    return found


def _can_join(first: TokenRun, later: TokenRun) -> bool:
    """Whether one run can say both; a job that was submitted again begins anew."""
    return later.finish in _JOINABLE and later.index == first.index + len(first.token_ids)


def _one(first: TokenRun, later: TokenRun) -> TokenRun:
    """Return the run of both; the later one continues the first."""
    return TokenRun(
        job_id=first.job_id,
        epoch=first.epoch,
        index=first.index,
        token_ids=first.token_ids + later.token_ids,
        logprobs=first.logprobs + later.logprobs,
        margins=first.margins + later.margins,
        alternatives=first.alternatives + later.alternatives,
        finish=later.finish,
        error=later.error,
        cached_tokens=first.cached_tokens,
        draft_tokens=first.draft_tokens + later.draft_tokens,
        accepted_draft_tokens=first.accepted_draft_tokens + later.accepted_draft_tokens,
        device_s=first.device_s + later.device_s,
        held_s=first.held_s,
    )
