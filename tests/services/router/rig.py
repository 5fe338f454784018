"""A real router over in-memory state and queue, and a scripted worker over real gRPC."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from gearfall.core.generation.job import FinishReason, Job, TokenAlternative, TokenRun
from gearfall.core.generation.streaming import Streaming
from gearfall.core.ids import DeploymentName, ModelName, WorkerId
from gearfall.core.ports import QueuedJob
from gearfall.core.records import (
    DeploymentRecord,
    ReplicaRecord,
    ReplicaState,
    Stage,
)
from gearfall.infra.net.convert import token_run_to_pb
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.queue.memory_queue import MemoryQueue, MemoryQueueServer
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState, MemoryStateServer
from gearfall.pb import router_pb2 as pb
from gearfall.pb.router_pb2_grpc import TokenSinkStub
from services.router import background
from services.router.generation import (
    ChoiceEnd,
    Delta,
    GenerationEvent,
    GenerationRequest,
    Replace,
    TextPrompt,
    Wait,
)
from services.router.main import Router, RouterSettings
from services.router.service import RouterLimits
from tests.services.router.char_models import EOS_ID, NODE, Files, ids_of, model_record


@dataclass
class Answer:
    """What a scripted model says to any prompt: text, then its end."""

    text: str = "hello"
    logprob: float = -0.1
    margin: float = 2.0
    finish: FinishReason = FinishReason.STOP
    error: str = ""
    cached_tokens: int = 0
    device_s: float = 0.0
    """Of every token."""
    logprobs: tuple[float, ...] = ()
    """Of the first tokens, in place of `logprob`."""
    token_ids: tuple[int, ...] = ()
    """In place of the text's."""

    def run_at(self, job: Job, index: int) -> TokenRun:
        """The one-token run at `index`, as an engine would send it."""
        ids = (*(self.token_ids or ids_of(self.text)), EOS_ID)
        logprob = self.logprobs[index] if index < len(self.logprobs) else self.logprob
        limit = job.sampling.max_tokens
        is_end = index == len(ids) - 1
        finish = self.finish if is_end else FinishReason.LENGTH if index == limit - 1 else None
        if finish is FinishReason.ERROR:
            return TokenRun(job.job_id, job.epoch, index, finish=finish, error=self.error)
        other = TokenAlternative(ids_of("z")[0], logprob - self.margin)
        top = (TokenAlternative(ids[index], logprob), other)[: job.sampling.top_logprobs]
        return TokenRun(
            job.job_id,
            job.epoch,
            index,
            token_ids=(ids[index],),
            logprobs=(logprob,),
            margins=(self.margin,),
            alternatives=(top,) if top else (),
            finish=finish,
            cached_tokens=self.cached_tokens if index == 0 else 0,
            device_s=self.device_s,
        )


@dataclass
class ScriptedWorker:
    """Claims jobs of its models one at a time and plays their answers, one token a message."""

    rig: "Rig"
    worker_id: str
    answers: dict[str, Answer]
    die_at: dict[int, int] = field(default_factory=dict)
    """How many deaths of the stream are still to come just before the token of that index."""
    repeat: bool = False
    """Send every run twice."""
    hold_at: int | None = None
    """Wait for `gate` before the token of that index."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    jobs: list[Job] = field(default_factory=list)
    stops: list[pb.JobStop] = field(default_factory=list)
    replied: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Work until cancelled; a broken stream is opened again."""
        while True:
            async with open_channel(self.rig.router.grpc_address) as channel:
                self._call = TokenSinkStub(channel).Push()
                hello = pb.WorkerHello(worker_id=self.worker_id, node_id=NODE)
                await self._call.write(pb.WorkerPush(hello=hello))
                reply = await self._call.read()
                assert isinstance(reply, pb.RouterReply)
                assert reply.hello.router_id == self.rig.router.router_id
                with contextlib.suppress(_DiedError):
                    await self._work()

    async def _work(self) -> None:
        while True:
            queued = await self._next_job()
            if queued is not None:
                await self._play(queued)

    async def _next_job(self) -> QueuedJob | None:
        queue = self.rig.queue
        # Taken before the look, so that what is appended meanwhile wakes the wait.
        change = self.rig.queue_server.change
        for model in self.answers:
            mine = await queue.reclaim(
                ModelName(model), self.worker_id, alive=frozenset(), max_jobs=1
            ) or await queue.claim(ModelName(model), self.worker_id, max_jobs=1, block_s=0)
            if mine:
                return mine[0]
        await change.wait()
        return None

    async def _play(self, queued: QueuedJob) -> None:
        job = queued.job
        self.jobs.append(job)
        claim = pb.JobClaim(job_id=job.job_id, epoch=job.epoch, model=job.model)
        await self._call.write(pb.WorkerPush(claim=claim))
        reader = asyncio.create_task(self._until_replied(job))
        try:
            index = len(job.generated_token_ids)
            while not reader.done():
                if self.die_at.get(index, 0):
                    self.die_at[index] -= 1
                    await self._until_arrived(job, index)
                    self._call.cancel()
                    await self.rig.queue.acknowledge(job.model, [queued.entry_id])
                    raise _DiedError
                if self.hold_at == index:
                    self.held.set()
                    await asyncio.wait(
                        (reader, asyncio.create_task(self.gate.wait())),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if reader.done():
                        break
                run = self.answers[job.model].run_at(job, index)
                step = pb.StepTokens(runs=[token_run_to_pb(run)] * (2 if self.repeat else 1))
                await self._call.write(pb.WorkerPush(step=step))
                index += max(1, len(run.token_ids))
                if run.finish is not None:
                    break
            await reader
        finally:
            reader.cancel()
        await self.rig.queue.acknowledge(job.model, [queued.entry_id])

    async def _until_arrived(self, job: Job, index: int) -> None:
        """What was written is at the router: a cancelled call may drop what it still holds."""
        log = self.rig.router.jobs._jobs[job.job_id].log
        await self.rig.until(lambda: len(log.token_ids) == index and log.owner is not None)

    async def _until_replied(self, job: Job) -> None:
        while True:
            reply = await self._call.read()
            assert isinstance(reply, pb.RouterReply)
            ended: list[pb.JobStop | pb.JobFinished] = [*reply.finished.jobs]
            if reply.HasField("stop"):
                ended.append(reply.stop)
                self.stops.append(reply.stop)
            if any((each.job_id, each.epoch) == (job.job_id, job.epoch) for each in ended):
                self.replied.set()
                return


class _DiedError(Exception):
    """The scripted worker's stream was cut."""


@dataclass
class Rig:
    """A running router with what it stands on."""

    router: Router
    cluster: Cluster
    state_server: MemoryStateServer
    queue_server: MemoryQueueServer
    queue: MemoryQueue
    files: Files
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def worker(self, worker_id: str = "worker-a", **answers: Answer) -> ScriptedWorker:
        """Start a scripted worker; model names are given with '_' for '-'."""
        named = {name.replace("_", "-"): answer for name, answer in answers.items()}
        worker = ScriptedWorker(self, worker_id, named)
        self.tasks.append(asyncio.create_task(worker.run()))
        return worker

    async def add_model(self, name: str, *, ready: bool = True, **facts: int) -> None:
        """Register a model, with a ready replica unless told otherwise."""
        revision = await self.cluster.put_model(model_record(name, **facts))
        if ready:
            revision = await self.set_replica(name, ReplicaState.READY)
        await self.cluster.wait_seen(revision)

    async def set_replica(self, name: str, state: ReplicaState, error: str = "") -> int:
        """Publish a replica of a model."""
        lease = await self.cluster.grant_lease(60)
        record = ReplicaRecord(
            WorkerId("worker-a"), NODE, ModelName(name), state, 8, 0, 1, 0, 0.0, error=error
        )
        revision = await self.cluster.put_replica(record, lease=lease)
        await self.cluster.wait_seen(revision)
        return revision

    async def deploy(
        self,
        name: str,
        *stages: tuple[str, float | None],
        streaming: Streaming | None = None,
        **fields: Any,
    ) -> None:
        """Put a deployment."""
        record = DeploymentRecord(
            DeploymentName(name),
            tuple(Stage(ModelName(model), threshold) for model, threshold in stages),
            streaming=streaming or Streaming(),
            **fields,
        )
        revision = await self.cluster.put_deployment(record)
        await self.cluster.wait_seen(revision)

    async def ask(self, model: str, prompt: str = "hi", **fields: object) -> "Outcome":
        """Run one request to its end."""
        request = GenerationRequest(model, (TextPrompt(prompt),), **fields)  # type: ignore[arg-type]
        running = await self.router.service.start(request)
        outcome = Outcome()
        async for batch in running.batches():
            outcome.events += batch
        await running.wait_stopped()
        return outcome

    async def until(self, holds: Callable[[], bool], *, within_s: float = 5.0) -> None:
        """Return when `holds()`; looked at again whenever the loop has run.

        `within_s` is time that this process had: others that keep the machine busy cost it nothing.
        """
        until_s = time.process_time() + within_s
        while not holds():
            if time.process_time() > until_s:
                raise TimeoutError
            await asyncio.sleep(0)


@dataclass
class Outcome:
    """The events of one request."""

    events: list[GenerationEvent] = field(default_factory=list)

    @property
    def ends(self) -> list[ChoiceEnd]:
        return sorted(
            (each for each in self.events if isinstance(each, ChoiceEnd)), key=lambda e: e.choice
        )

    @property
    def waits(self) -> list[Wait]:
        return [each for each in self.events if isinstance(each, Wait)]

    def text(self, choice: int = 0) -> str:
        return "".join(each.text for each in self.deltas(choice))

    def deltas(self, choice: int = 0) -> list[Delta]:
        """What a client has in the end: the deltas behind the choice's last Replace."""
        found: list[Delta] = []
        for each in self.events:
            if isinstance(each, Replace) and each.choice == choice:
                found.clear()
            elif isinstance(each, Delta) and each.choice == choice:
                found.append(each)
        return found


class _Failures(logging.Handler):
    """Keeps what background tasks ended with, which nobody else hears of."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


@contextlib.asynccontextmanager
async def running_rig(
    *, limits: RouterLimits | None = None, **settings: object
) -> AsyncIterator[Rig]:
    """A started router; everything is stopped and checked afterwards, background tasks too."""
    failures = _Failures(logging.ERROR)
    logging.getLogger(background.__name__).addHandler(failures)
    state_server, queue_server = MemoryStateServer(), MemoryQueueServer()
    state, queue, files = MemoryState(state_server), MemoryQueue(queue_server), Files()
    cluster = Cluster(state)
    await cluster.start()
    chosen = RouterSettings(
        limits=limits or RouterLimits(stop_grace_s=0.05, entry_check_s=0.02),
        gather_finished_s=0.0,
        **settings,  # type: ignore[arg-type]
    )
    router = Router(chosen, cluster, state, queue, files=files)
    await router.start()
    rig = Rig(router, cluster, state_server, queue_server, queue, files)
    try:
        yield rig
        router.jobs.check()
    finally:
        for task in rig.tasks:
            task.cancel()
        await asyncio.gather(*rig.tasks, return_exceptions=True)
        await router.stop()
        await cluster.stop()
        await state.close()
        logging.getLogger(background.__name__).removeHandler(failures)
    assert not failures.records, failures.records


def probability(logprob: float, tokens: int) -> float:
    return math.exp(logprob * tokens)
