"""Jobs of a vLLM engine behind gearfall's messages: submit, cancel, hold, freeze, one step result.

vLLM batches, samples and keeps its cache by itself; a job here is one request to it, from the
tokens there are. It gives no access to keys and values, so a job moves by its tokens alone:

    SubmitJob, ReleaseJob, ThawJob   a request over prompt and log; what it yields continues the log
    FreezeJob                        the request is aborted; the log is what was received
    HoldJob, FeedJob                 requests for one token, which is dropped, until all there is
                                     lies in vLLM's own cache for ReleaseJob; `by_kv` is refused
    PinJob, UnpinJob                 reported, nothing to keep
    ProbeEngine                      answered when no request runs; else vLLM's next output is the
                                     answer, and its processor time tells that it is not frozen

A greedy answer is the same after a move as far as vLLM's arithmetic is. A sampled one is not: the
random stream of a vLLM request depends on how often it was drawn from, so a resumed request draws
from a seed of its own, made of the job's seed and the index it goes on at.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace

from gearfall.core.generation.job import FinishReason, TokenRun
from services.worker.engine.batching.adapter_jobs import AdapterJobs, NoAdapters
from services.worker.engine.batching.job_limits import JobLimits
from services.worker.engine.batching.sequence import Sequence, SequenceKey
from services.worker.engine.batching.time_shares import TimeShares
from services.worker.engine.vllm_values import (
    VllmClient,
    VllmRequest,
    VllmToken,
    end_of,
    run_of,
    sequence_of,
)
from services.worker.engine_link.messages import (
    AttachAdapter,
    CancelJob,
    DropAdapter,
    FeedJob,
    FreezeJob,
    HoldJob,
    JobPhase,
    JobReport,
    PinJob,
    ProbeEngine,
    ReleaseJob,
    StepDone,
    SubmitJob,
    ThawJob,
    UnpinJob,
    WorkerMessage,
)

_LOG = logging.getLogger(__name__)
_NO_KV = "this engine's keys and values can't be read or written: move the job by its tokens"
_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Spreads the seeds of one job's continuations (2^64 over the golden ratio)."""


@dataclass(slots=True)
class _Job:
    """One job and what is done for it."""

    sequence: Sequence
    phase: JobPhase = JobPhase.RUNNING
    warmed_tokens: int = 0
    """Of a held job, tokens whose prefix vLLM has computed."""
    task: asyncio.Task[None] | None = field(default=None, compare=False)
    timer: asyncio.TimerHandle | None = field(default=None, compare=False)


class VllmJobs:
    """Owner of the jobs of one vLLM engine. `emit` gets each step's result, on the event loop."""

    def __init__(
        self,
        client: VllmClient,
        emit: Callable[[StepDone], None],
        *,
        total_tokens: int,
        vocabulary_size: int,
        unix_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`total_tokens`: most tokens of prompt and answer."""
        self._client = client
        self._emit = emit
        self._adapters = AdapterJobs(NoAdapters(), lambda _: False)
        self._limits = JobLimits(total_tokens, vocabulary_size, self._adapters.find_fault)
        self._unix_clock = unix_clock
        self._clock = clock
        self.shares = TimeShares()
        """Whose the engine's time was."""
        self._jobs: dict[SequenceKey, _Job] = {}
        self._runs: list[TokenRun] = []
        self._due: dict[SequenceKey, JobReport | None] = {}
        self._is_flushing = False
        self._flushed_s = clock()
        self._requests = 0
        self._is_probed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.died = asyncio.Event()
        """Set when vLLM is dead; nothing more comes of any job."""

    def handle(self, message: WorkerMessage) -> None:
        """Do what the worker says; the next step's result answers."""
        match message:
            case SubmitJob():
                self._submit(message)
            case CancelJob():
                self._drop((message.job_id, message.epoch))
            case HoldJob():
                self._hold(message)
            case FeedJob():
                self._feed(message)
            case ReleaseJob() | PinJob() | FreezeJob() | ThawJob():
                self._change(message)
            case UnpinJob() | DropAdapter():
                pass
            case ProbeEngine():
                self._is_probed = True
                self._answer_probe()
            case AttachAdapter():
                self._adapters.attach(message, ())
                self._flush_soon()
            case _:
                raise AssertionError(f"{type(message).__name__} came to a running engine")

    async def stop(self) -> None:
        """Abort every request."""
        for key in tuple(self._jobs):
            self._drop(key)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Assert that exactly the jobs that run have a request."""
        for key, job in self._jobs.items():
            assert job.sequence.key == key
            is_asked = job.task is not None and not job.task.done()
            assert job.phase is JobPhase.HELD or is_asked == (job.phase is JobPhase.RUNNING)

    def _submit(self, message: SubmitJob) -> None:
        if (message.job_id, message.epoch) in self._jobs:
            return
        job = _Job(sequence_of(message))
        fault = self._limits.find_fault(message)
        finish = FinishReason.ERROR if fault else self._limits.find_finish(job.sequence)
        if finish is not None:
            self._put(end_of(job.sequence, finish, fault))
            return
        self._admit(job, message)
        self._ask(job)

    def _hold(self, message: HoldJob) -> None:
        key = (message.job.job_id, message.job.epoch)
        if key in self._jobs:
            self._report(key)
            return
        fault = _NO_KV if message.by_kv else self._limits.find_fault(message.job)
        if fault:
            self._refuse(key, fault)
            return
        job = _Job(sequence_of(message.job), JobPhase.HELD)
        self._admit(job, message.job)
        self._warm(job)
        self._report(key)

    def _feed(self, message: FeedJob) -> None:
        key = (message.job_id, message.epoch)
        job = self._jobs.get(key)
        if job is not None and job.phase is JobPhase.HELD:
            sequence = job.sequence
            fresh = message.token_ids[max(0, sequence.next_index - message.index) :]
            is_gap = message.index > sequence.next_index
            fault = self._limits.find_answer_fault(len(sequence.tokens), fresh)
            if is_gap or fault:
                self._drop(key)
                self._refuse(key, fault or "tokens are missing before those that came")
                return
            sequence.tokens += fresh
            if job.task is None or job.task.done():
                self._warm(job)
        self._report(key)

    def _change(self, message: ReleaseJob | PinJob | FreezeJob | ThawJob) -> None:
        key = (message.job_id, message.epoch)
        job = self._jobs.get(key)
        if job is not None:
            match message:
                case FreezeJob() if job.phase is JobPhase.RUNNING:
                    self._abort(job)
                    job.phase = JobPhase.FROZEN
                case ThawJob() if job.phase is JobPhase.FROZEN:
                    self._go_on(job)
                case ReleaseJob() if job.phase is JobPhase.HELD:
                    self._abort(job)
                    self._go_on(job)
        self._report(key)

    def _go_on(self, job: _Job) -> None:
        finish = self._limits.find_finish(job.sequence)
        job.phase = JobPhase.RUNNING
        if finish is None:
            self._ask(job)
        else:
            self._end(job, finish)

    def _admit(self, job: _Job, message: SubmitJob) -> None:
        self._jobs[job.sequence.key] = job
        if message.deadline_unix_s > 0:
            left_s = max(0.0, message.deadline_unix_s - self._unix_clock())
            loop = asyncio.get_running_loop()
            job.timer = loop.call_later(left_s, self._expire, job)

    def _expire(self, job: _Job) -> None:
        if self._jobs.get(job.sequence.key) is job:
            self._end(job, FinishReason.DEADLINE)

    def _ask(self, job: _Job) -> None:
        self.shares.begin(job.sequence.key, self._clock())
        job.task = self._spawn(self._follow(job, self._request(job)))

    def _warm(self, job: _Job) -> None:
        self.shares.begin(job.sequence.key, self._clock())
        job.task = self._spawn(self._compute_all(job))

    def _request(self, job: _Job) -> VllmRequest:
        sequence = job.sequence
        self._requests += 1
        index, sampling = sequence.next_index, sequence.sampling
        room = min(sampling.max_tokens - index, self._limits.total_tokens - len(sequence.tokens))
        seed = (sampling.seed + index * _SEED_STRIDE) % 2**63
        return VllmRequest(
            request_id=f"{sequence.job_id}/{sequence.epoch}/{self._requests}",
            token_ids=tuple(sequence.tokens),
            sampling=replace(sampling, max_tokens=max(1, room), seed=seed),
            tenant=sequence.tenant,
            priority=sequence.priority,
        )

    async def _follow(self, job: _Job, request: VllmRequest) -> None:
        """Take a request's tokens into the job's log until its answer is whole."""
        try:
            async with contextlib.aclosing(self._client.generate(request)) as outputs:
                async for tokens in outputs:
                    for token in tokens:
                        if self._take(job, token):
                            return
            self._end(job, FinishReason.ERROR, "vLLM ended the answer before it was whole")
        except ConnectionError as error:
            _LOG.exception("vLLM is dead", extra={"error": str(error)})
            self.died.set()
        except Exception as error:
            _LOG.exception("vLLM failed a request", extra={"job_id": job.sequence.job_id})
            cause = error.__cause__ or error  # it wraps what it did not expect, without a word
            self._end(job, FinishReason.ERROR, f"vLLM: {type(cause).__name__}: {cause}")

    def _take(self, job: _Job, token: VllmToken) -> bool:
        """Append one token; return whether it was the last."""
        sequence = job.sequence
        index = sequence.next_index
        sequence.tokens.append(token.token_id)
        finish = self._limits.find_finish(sequence)
        self._put(run_of(sequence, index, token, finish))
        if finish is not None:
            self._forget(job)
        return finish is not None

    async def _compute_all(self, job: _Job) -> None:
        """Have vLLM compute a held job's tokens until none is left, and report each time.

        What vLLM fails, or ends without an output, counts as computed: the release computes it,
        only the head start is lost.
        """
        while job.phase is JobPhase.HELD and job.warmed_tokens < len(job.sequence.tokens):
            request = self._request(job)
            one = replace(request, sampling=replace(request.sampling, max_tokens=1))
            try:
                async with contextlib.aclosing(self._client.generate(one)) as outputs:
                    async for _ in outputs:
                        pass
            except ConnectionError:
                self.died.set()
                return
            except Exception as error:
                _LOG.warning("a held job was not computed ahead", extra={"error": str(error)})
            job.warmed_tokens = len(request.token_ids)
            self._report(job.sequence.key)
        self.shares.pause(job.sequence.key, self._clock())

    def _end(self, job: _Job, finish: FinishReason, error: str = "") -> None:
        if self._jobs.get(job.sequence.key) is job:
            self._put(end_of(job.sequence, finish, error))
            self._forget(job)

    def _drop(self, key: SequenceKey) -> None:
        if job := self._jobs.get(key):
            self._forget(job)

    def _forget(self, job: _Job) -> None:
        self._jobs.pop(job.sequence.key, None)
        self._abort(job)
        self.shares.drop(job.sequence.key, self._clock())
        if job.timer is not None:
            job.timer.cancel()

    def _abort(self, job: _Job) -> None:
        if job.task is not None and job.task is not asyncio.current_task():
            job.task.cancel()
        job.task = None
        self.shares.pause(job.sequence.key, self._clock())

    def _put(self, run: TokenRun) -> None:
        device_s = self.shares.take((run.job_id, run.epoch), self._clock())
        self._runs.append(replace(run, device_s=device_s))
        self._flush_soon()

    def _refuse(self, key: SequenceKey, error: str) -> None:
        self._due[key] = JobReport(*key, JobPhase.REFUSED, error=error)
        self._flush_soon()

    def _report(self, key: SequenceKey) -> None:
        self._due[key] = None
        self._flush_soon()

    def _flush_soon(self) -> None:
        """Send what one turn of the event loop brings as one step."""
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        runs, self._runs = self._runs, []
        due, self._due = self._due, {}
        now_s = self._clock()
        held = sum(job.phase is not JobPhase.RUNNING for job in self._jobs.values())
        self._is_flushing = self._is_probed = False
        self._emit(
            StepDone(
                runs=tuple(runs),
                running_jobs=len(self._jobs) - held,
                waiting_jobs=held,
                step_s=now_s - self._flushed_s,
                reports=tuple(report or self._standing(key) for key, report in due.items()),
                adapters=self._adapters.take_reports(),
            )
        )
        self._flushed_s = now_s

    def _standing(self, key: SequenceKey) -> JobReport:
        job = self._jobs.get(key)
        if job is None:
            return JobReport(*key, JobPhase.GONE)
        sequence = job.sequence
        is_held = job.phase is JobPhase.HELD
        computed = job.warmed_tokens if is_held else len(sequence.tokens) - 1
        return JobReport(*key, job.phase, sequence.next_index, computed)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._answer_probe()

    def _answer_probe(self) -> None:
        if self._is_probed and not self._tasks:
            self._flush_soon()
