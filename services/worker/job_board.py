"""Jobs between queue, engine and router: performs what the claims' table says.

Owner of the claim book and of one push stream per router. Everything here runs without awaiting,
so an event is always handled whole.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Protocol

from gearfall.core.ids import Epoch, JobId, ModelName, RouterId
from gearfall.core.job import Job, TokenRun
from gearfall.core.ports import QueuedJob
from gearfall.infra.failpoints import failpoint
from services.worker.claims import ClaimBook, ClaimEvent, ClaimKey, ClaimState, Effect, Todo
from services.worker.engine_messages import CancelJob, StepDone, SubmitJob
from services.worker.ports import EngineProcess
from services.worker.push_stream import PushListener, PushStream
from services.worker.settlement import Settlement

KEPT_GONE_ROUTERS = 1024
GIVEN_BACK = "the replica is being drained"
ENGINE_LOST = "the engine process is gone"

_log = logging.getLogger(__name__)


class StreamOpener(Protocol):
    """Makes the push stream to one router."""

    def __call__(self, address: str, listener: PushListener) -> PushStream:
        """Return a stream that was not started yet."""
        ...


class JobBoard:
    """Owner of this worker's claims. Implements `PushListener`."""

    def __init__(
        self,
        settlement: Settlement,
        open_stream: StreamOpener,
        is_router_alive: Callable[[RouterId], bool],
        *,
        on_lost: Callable[[ModelName, str], None] = lambda _model, _reason: None,
    ) -> None:
        """`on_lost` hears of each job that is handed back: its model, and `engine` or `drain`."""
        self._on_lost = on_lost
        self._settlement = settlement
        self._open_stream = open_stream
        self._is_router_alive = is_router_alive
        self._book = ClaimBook()
        self._streams: dict[str, PushStream] = {}
        self._engines: dict[ModelName, EngineProcess] = {}
        self._watchers: dict[ModelName, Callable[[], None]] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._gone_routers: OrderedDict[RouterId, None] = OrderedDict()

    async def stop(self, *, timeout_s: float = 1.0) -> None:
        """Let routers answer what they were told, briefly, and end every stream.

        Entries of claims that are left go to whoever reclaims them.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_empty.wait()
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            await stream.stop()

    def watch(self, model: ModelName, on_change: Callable[[], None]) -> None:
        """Call `on_change` whenever the model's claims change, until `unwatch`."""
        self._watchers[model] = on_change

    def unwatch(self, model: ModelName) -> None:
        """Stop calling. Idempotent."""
        self._watchers.pop(model, None)

    def occupied_slots(self, model: ModelName) -> int:
        """How many slots of the model's replica are taken."""
        return self._book.occupied_slots(model)

    def accept(self, queued: QueuedJob) -> None:
        """Take a claimed queue entry in; it is submitted as soon as its router can be told."""
        job = queued.job
        if not self._book.add(queued):
            return
        self._is_empty.clear()
        if job.router_id in self._gone_routers and not self._is_router_alive(job.router_id):
            self._apply(_key(job), ClaimEvent.ROUTER_GONE)
            return
        stream = self._stream_to(job.router_address)
        if stream.router_id == job.router_id:
            self._apply(_key(job), ClaimEvent.CONNECTED)
        elif stream.router_id is not None:
            self._meet_another(job, stream)

    def _meet_another(self, job: Job, stream: PushStream) -> None:
        """Another router than the job's serves at its address, or the stream is out of date."""
        if self._is_router_alive(job.router_id):
            stream.reconnect()
        else:
            self._apply(_key(job), ClaimEvent.ROUTER_GONE)

    def attach_engine(self, model: ModelName, engine: EngineProcess) -> None:
        """Submit the model's jobs to `engine` from now on."""
        self._engines[model] = engine

    def detach_engine(self, model: ModelName) -> None:
        """The model's engine is gone: its running jobs are lost here. Idempotent."""
        if self._engines.pop(model, None) is not None:
            for claim in self._book.of_model(model):
                self._apply(claim.key, ClaimEvent.ENGINE_DIED)

    def give_back(self, model: ModelName) -> tuple[JobId, ...]:
        """Hand the model's running jobs back to their routers and return which."""
        running = [c for c in self._book.of_model(model) if c.state is ClaimState.RUNNING]
        for claim in running:
            self._apply(claim.key, ClaimEvent.GIVE_BACK)
        return tuple(claim.job.job_id for claim in running)

    def push_step(self, step: StepDone) -> None:
        """Send one decode step's tokens: one message for each router that has a part in it."""
        runs_by_address: defaultdict[str, list[TokenRun]] = defaultdict(list)
        for run in step.runs:
            if claim := self._book.take(run):
                failpoint("worker.push", job_id=run.job_id, model=claim.job.model)
                runs_by_address[claim.job.router_address].append(run)
        for address, runs in runs_by_address.items():
            self._streams[address].send_step(runs)
            for run in runs:
                if run.finish is not None:
                    self._apply((run.job_id, run.epoch), ClaimEvent.FINAL_RUN)

    def stream_opened(self, address: str, router_id: RouterId) -> None:
        """See `PushListener`."""
        for claim in self._book.of_address(address):
            is_its_own = claim.job.router_id == router_id
            event = ClaimEvent.CONNECTED if is_its_own else ClaimEvent.ROUTER_GONE
            self._apply(claim.key, event)

    def stream_broke(self, address: str) -> bool:
        """See `PushListener`."""
        claims = self._book.of_address(address)
        for claim in claims:
            self._apply(claim.key, ClaimEvent.BROKEN)
        return bool(claims)

    def stream_abandoned(self, address: str) -> None:
        """See `PushListener`."""
        self._streams.pop(address, None)
        claims = self._book.of_address(address)
        if claims:
            _log.warning("router is gone", extra={"address": address, "jobs": len(claims)})
        for claim in claims:
            self._forget_router(claim.job.router_id)
            self._apply(claim.key, ClaimEvent.ROUTER_GONE)

    def job_stopped(self, job_id: JobId, epoch: Epoch, reason: str) -> None:
        """See `PushListener`."""
        _log.debug("job stopped", extra={"job_id": job_id, "epoch": epoch, "reason": reason})
        self._apply((job_id, epoch), ClaimEvent.STOP)

    def job_finished(self, job_id: JobId, epoch: Epoch) -> None:
        """See `PushListener`."""
        self._apply((job_id, epoch), ClaimEvent.FINISHED)

    def check(self) -> None:
        """Assert that every claim has a stream that will decide about it."""
        self._book.check()
        for claim in self._book:
            stream = self._streams.get(claim.job.router_address)
            assert stream is not None
            assert claim.state is ClaimState.UNSETTLED or stream.router_id == claim.job.router_id

    def _apply(self, key: ClaimKey, event: ClaimEvent) -> None:
        claim = self._book.get(key)
        if claim is None:
            return
        for todo in self._book.apply(key, event):
            self._perform(todo, event)
        if len(self._book) == 0:
            self._is_empty.set()
        if on_change := self._watchers.get(claim.job.model):
            on_change()

    def _perform(self, todo: Todo, event: ClaimEvent) -> None:
        job, stream = todo.job, self._streams.get(todo.job.router_address)
        match todo.effect:
            case Effect.SEND_CLAIM:
                assert stream is not None
                stream.send_claim(job)
            case Effect.SEND_LOST:
                assert stream is not None
                is_drain = event is ClaimEvent.GIVE_BACK
                stream.send_lost(job, GIVEN_BACK if is_drain else ENGINE_LOST)
                self._on_lost(job.model, "drain" if is_drain else "engine")
            case Effect.SUBMIT:
                self._submit(job)
            case Effect.CANCEL:
                if engine := self._engines.get(job.model):
                    engine.send(CancelJob(job.job_id, job.epoch))
            case Effect.ACKNOWLEDGE:
                failpoint("worker.release", job_id=job.job_id, model=job.model)
                self._settlement.acknowledge(job.model, todo.entry_ids)

    def _submit(self, job: Job) -> None:
        engine = self._engines.get(job.model)
        if engine is None:
            self._apply(_key(job), ClaimEvent.ENGINE_DIED)
            return
        failpoint("worker.submit", job_id=job.job_id, model=job.model)
        engine.send(
            SubmitJob(
                job_id=job.job_id,
                epoch=job.epoch,
                prompt_token_ids=job.prompt_token_ids,
                generated_token_ids=job.generated_token_ids,
                sampling=job.sampling,
                tenant=job.tenant,
                priority=job.priority,
                deadline_unix_s=job.deadline_unix_s,
                adapter=job.adapter,
            )
        )

    def _stream_to(self, address: str) -> PushStream:
        if address not in self._streams:
            self._streams[address] = self._open_stream(address, self)
            self._streams[address].start()
        return self._streams[address]

    def _forget_router(self, router_id: RouterId) -> None:
        self._gone_routers[router_id] = None
        while len(self._gone_routers) > KEPT_GONE_ROUTERS:
            self._gone_routers.popitem(last=False)


def _key(job: Job) -> ClaimKey:
    return (job.job_id, job.epoch)
