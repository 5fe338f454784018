"""An engine process that is given a job's LoRA adapter before the job.

Stands between the job board and the engine and implements `services.worker.ports.EngineProcess`.
A job names its adapter; what the engine gets names the adapter's digest. A job whose adapter is
still coming waits here, with everything that is said about it; one whose adapter can't be had ends
here with an error. The job's end, seen in what the engine says, gives the adapter free.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager

import msgspec

from gearfall.core.errors import GearfallError
from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.ids import Epoch, JobId, ModelName
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.engine_link.messages import (
    AdapterReport,
    AttachAdapter,
    CancelJob,
    DropAdapter,
    EngineReady,
    FeedJob,
    FreezeJob,
    HoldJob,
    JobPhase,
    JobReport,
    PinJob,
    ReleaseJob,
    StepDone,
    SubmitJob,
    ThawJob,
    UnpinJob,
    WorkerMessage,
)
from services.worker.ports import EngineProcess
from services.worker.processes.adapter_leases import AdapterLimits, AdapterTable
from services.worker.processes.adapter_source import AdapterLease, AdapterSource, Brought

_log = logging.getLogger(__name__)
_Key = tuple[JobId, Epoch]
_AboutJob = CancelJob | FeedJob | FreezeJob | PinJob | ReleaseJob | ThawJob | UnpinJob
_GONE = frozenset({JobPhase.GONE, JobPhase.REFUSED})


class AdapterEngine:
    """Gives one running engine the adapters that its jobs ask for. Call `close` at its end."""

    def __init__(
        self,
        engine: EngineProcess,
        bring: AdapterSource,
        *,
        on_change: Callable[[], None] = lambda: None,
        limits: AdapterLimits | None = None,
    ) -> None:
        """`on_change`: told when `adapters` has changed."""
        self._engine = engine
        self._bring = bring
        self._on_change = on_change
        self._table = AdapterTable(limits or AdapterLimits())
        self._leases: dict[ModelName, AdapterLease] = {}
        self._waiting: defaultdict[ModelName, list[WorkerMessage]] = defaultdict(list)
        self._tasks: set[asyncio.Task[None]] = set()
        self._steps: asyncio.Queue[StepDone | None] = asyncio.Queue()
        self._may_stay: Callable[[ModelName, str], bool] = lambda _name, _digest: True
        self._spawn(self._follow())

    @property
    def adapters(self) -> tuple[ModelName, ...]:
        """Adapters that are here or on their way, by name."""
        return tuple(sorted(self._table.names))

    @property
    def pid(self) -> int:
        """See the port."""
        return self._engine.pid

    @property
    def kv_memory(self) -> KvMemory | None:
        """See the port."""
        return self._engine.kv_memory

    @property
    def arithmetic(self) -> str:
        """See the port."""
        return self._engine.arithmetic

    async def ready(self) -> EngineReady:
        """See the port."""
        return await self._engine.ready()

    async def wait_exit(self) -> object:
        """See the port."""
        return await self._engine.wait_exit()

    def kill(self) -> None:
        """See the port."""
        self._engine.kill()

    async def send_with(self, message: WorkerMessage, descriptors: Sequence[int]) -> None:
        """See the port."""
        await self._engine.send_with(message, descriptors)

    async def __aiter__(self) -> AsyncIterator[StepDone]:
        """Yield the engine's steps, and those that end jobs whose adapter can't be had."""
        while (step := await self._steps.get()) is not None:
            yield step

    def send(self, message: WorkerMessage) -> None:
        """Pass a message on, now or when the adapter that its job waits for is here."""
        match message:
            case SubmitJob(adapter=adapter) if adapter:
                self._want(ModelName(adapter), (message.job_id, message.epoch), message)
            case HoldJob(job=job) if job.adapter:
                self._want(ModelName(job.adapter), (job.job_id, job.epoch), message)
            case CancelJob() | UnpinJob() | FeedJob() | FreezeJob() | PinJob() | ReleaseJob():
                self._send_about(message)
            case ThawJob():
                self._send_about(message)
            case _:
                self._engine.send(message)

    def retire(self, stay: Callable[[ModelName, str], bool]) -> None:
        """Let every adapter go, once unused, of which `stay(name, digest)` does not hold.

        One that is on its way is judged when it is here.
        """
        self._may_stay = stay
        for name in self._table.names:
            self._judge(name)
        self._evict()

    async def close(self) -> None:
        """Give every lease back. Idempotent; the engine is the caller's to end."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lease in self._leases.values():
            lease.close()
        self._leases.clear()

    def check(self) -> None:
        """Assert that what is here is leased, and that only jobs whose adapter is coming wait."""
        self._table.check()
        here = {name for name in self._table.names if self._table.digest_of(name)}
        assert here == self._leases.keys()
        assert not here & {name for name, waiting in self._waiting.items() if waiting}

    def _judge(self, name: ModelName) -> None:
        digest = self._table.digest_of(name)
        if digest and not self._may_stay(name, digest):
            self._table.retire(name)

    def _want(self, name: ModelName, key: _Key, message: SubmitJob | HoldJob) -> None:
        held, is_new = self._table.want(name, key)
        if held.digest:
            self._engine.send(_for_engine(message, held.digest))
            return
        self._waiting[name].append(message)
        if is_new:
            self._spawn(self._fetch(name))
            self._on_change()

    def _send_about(self, message: _AboutJob) -> None:
        key = (message.job_id, message.epoch)
        name = self._table.adapter_of(key)
        is_waiting = name is not None and any(_key(each) == key for each in self._waiting[name])
        if name is None or not is_waiting:
            self._engine.send(message)
        elif isinstance(message, CancelJob):
            self._waiting[name] = [each for each in self._waiting[name] if _key(each) != key]
        else:
            self._waiting[name].append(message)
        if isinstance(message, CancelJob):
            self._release(key)

    async def _fetch(self, name: ModelName) -> None:
        try:
            brought = await self._bring(name)
        except GearfallError as error:
            self._give_up(name, f"adapter {name!r} can't be had: {error.message}")
        except Exception as error:
            _log.exception("unexpected error with an adapter", extra={"adapter": name})
            self._give_up(name, f"adapter {name!r} can't be had: {type(error).__name__}")
        else:
            await self._attach(name, brought)

    async def _attach(self, name: ModelName, brought: Brought) -> None:
        self._leases[name] = brought.lease
        message = AttachAdapter(
            brought.digest, name, brought.lease.manifest_json, brought.config_json
        )
        await self._engine.send_with(message, brought.lease.partition_fds)
        self._table.brought(name, brought.digest, brought.size_bytes)
        for waiting in self._waiting.pop(name, ()):
            self._engine.send(_for_engine(waiting, brought.digest))
        self._judge(name)
        self._evict()
        _log.info("adapter attached", extra={"adapter": name, "bytes": brought.size_bytes})

    def _give_up(self, name: ModelName, error: str) -> None:
        """End the jobs that wait for an adapter."""
        _log.warning("adapter not attached", extra={"adapter": name, "error": error})
        waiting = self._waiting.pop(name, [])
        self._table.lose(name)
        self._on_change()
        runs = tuple(_failed_run(each, error) for each in waiting if isinstance(each, SubmitJob))
        reports = tuple(_refusal(each, error) for each in waiting if isinstance(each, HoldJob))
        self._steps.put_nowait(StepDone(runs, 0, 0, 0.0, reports))

    async def _follow(self) -> None:
        """Take note of what the engine says, and pass it on."""
        try:
            async for step in self._engine:
                self._note(step)
                self._steps.put_nowait(step)
        finally:
            self._steps.put_nowait(None)

    def _note(self, step: StepDone) -> None:
        for report in step.adapters:
            if report.error:
                self._lose(report)
        for run in step.runs:
            if run.finish is not None:
                self._release((run.job_id, run.epoch))
        for job in step.reports:
            if job.phase in _GONE:
                self._release((job.job_id, job.epoch))

    def _lose(self, report: AdapterReport) -> None:
        """The engine refused an adapter; its jobs end there with the reason."""
        _log.warning("adapter refused", extra={"error": report.error})
        for name in self._table.named(report.adapter):
            self._table.lose(name)
            self._leases.pop(name).close()
        self._on_change()

    def _release(self, key: _Key) -> None:
        if self._table.adapter_of(key) is not None:
            self._table.release(key)
            self._evict()

    def _evict(self) -> None:
        gone = self._table.evict()
        for held in gone:
            if not self._table.named(held.digest):
                self._engine.send(DropAdapter(held.digest))
            self._leases.pop(held.name).close()
        if gone:
            self._on_change()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def adapting(
    engine: EngineProcess, bring: AdapterSource, on_change: Callable[[], None]
) -> AsyncIterator[AdapterEngine]:
    """Give `engine` its jobs' adapters until the block ends."""
    adapted = AdapterEngine(engine, bring, on_change=on_change)
    try:
        yield adapted
    finally:
        await adapted.close()


def _key(message: WorkerMessage) -> _Key | None:
    job = message.job if isinstance(message, HoldJob) else message
    with contextlib.suppress(AttributeError):
        return (job.job_id, job.epoch)  # type: ignore[union-attr]
    return None


def _for_engine(message: WorkerMessage, digest: str) -> WorkerMessage:
    """Return the message with the adapter's digest in the place of its name."""
    if isinstance(message, SubmitJob):
        return msgspec.structs.replace(message, adapter=digest)
    if isinstance(message, HoldJob):
        job = msgspec.structs.replace(message.job, adapter=digest)
        return msgspec.structs.replace(message, job=job)
    return message


def _failed_run(job: SubmitJob, error: str) -> TokenRun:
    index = len(job.generated_token_ids)
    return TokenRun(job.job_id, job.epoch, index, finish=FinishReason.ERROR, error=error)


def _refusal(message: HoldJob, error: str) -> JobReport:
    job = message.job
    return JobReport(job.job_id, job.epoch, JobPhase.REFUSED, error=error)
