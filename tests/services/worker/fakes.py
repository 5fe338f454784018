"""Stand-ins behind the worker's ports, and a scripted router that speaks real gRPC."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc
import msgspec

from gearfall.core.errors import GearfallError, NotFound, Unavailable
from gearfall.core.generation.job import FinishReason, Job, Priority, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId, ModelName, NodeId, RequestId, RouterId, WorkerId
from gearfall.core.records import ModelRecord, WorkerRecord
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from gearfall.infra.net.grpc_server import start_server
from gearfall.pb import router_pb2 as pb
from gearfall.pb import router_pb2_grpc
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.engine_link.messages import (
    CancelJob,
    EngineReady,
    StartEngine,
    StepDone,
    StopEngine,
    SubmitJob,
)
from services.worker.ports import LoadedModel

NODE = NodeId("node-a")
WORKER = WorkerId("worker-a")
MODEL = ModelName("small")
ROUTER = RouterId("router-a")


def job(
    name="job-1",
    *,
    epoch=1,
    address="",
    router_id=ROUTER,
    model=MODEL,
    generated=(),
    priority=Priority.INTERACTIVE,
    gather_s=0.0,
) -> Job:
    return Job(
        job_id=JobId(name),
        request_id=RequestId(f"req-{name}"),
        model=ModelName(model),
        epoch=Epoch(epoch),
        router_id=RouterId(router_id),
        router_address=address,
        prompt_token_ids=(1, 2, 3),
        generated_token_ids=tuple(generated),
        sampling=SamplingParams(max_tokens=8),
        priority=priority,
        gather_s=gather_s,
    )


def run_of(a_job: Job, index: int, *, finish=None, tokens=(7,)) -> TokenRun:
    return TokenRun(
        job_id=a_job.job_id,
        epoch=a_job.epoch,
        index=index,
        token_ids=tuple(tokens),
        logprobs=tuple(-0.5 for _ in tokens),
        margins=tuple(1.0 for _ in tokens),
        finish=finish,
    )


def step_of(*runs: TokenRun) -> StepDone:
    return StepDone(runs=runs, running_jobs=len(runs), waiting_jobs=0, step_s=0.001)


def model_record(name=MODEL) -> ModelRecord:
    return ModelRecord(
        name=ModelName(name),
        digest="d" * 32,
        architecture="LlamaForCausalLM",
        parameters=10,
        size_bytes=20,
        context_tokens=64,
        vocabulary_size=17,
        bos_token_id=None,
        eos_token_ids=(2,),
        source="/models/small",
        nodes=(NODE,),
        dtype="bfloat16",
        kv_bytes_per_token=4,
    )


def worker_record(worker_id=WORKER) -> WorkerRecord:
    return WorkerRecord(WorkerId(worker_id), NODE, "127.0.0.1:1", "cpu", 1 << 30, 4, slots=2)


class Watched:
    """Something whose changes a test can wait for."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                self._changed.clear()
                await self._changed.wait()


class FakeEngine(Watched):
    """An engine process that does what the test says."""

    def __init__(
        self, pid: int, ready_error: GearfallError | None = None, *, needs_pool: bool = True
    ) -> None:
        super().__init__()
        self.pid = pid
        self._needs_pool = needs_pool
        self.kv_memory: KvMemory | None = None
        self.arithmetic = "exact"
        self.sent: list[object] = []
        self._ready_error = ready_error
        self._steps: asyncio.Queue[StepDone | None] = asyncio.Queue()
        self._gone = asyncio.Event()

    @property
    def is_gone(self) -> bool:
        return self._gone.is_set()

    @property
    def submitted(self) -> list[tuple[str, int]]:
        return [(m.job_id, m.epoch) for m in self.sent if isinstance(m, SubmitJob)]

    @property
    def cancelled(self) -> list[tuple[str, int]]:
        return [(m.job_id, m.epoch) for m in self.sent if isinstance(m, CancelJob)]

    async def ready(self) -> EngineReady:
        if self._ready_error:
            raise self._ready_error
        return EngineReady(self.pid, 0.01, 0.02, 0.03, 1024, needs_pool=self._needs_pool)

    def send(self, message) -> None:
        self.sent.append(message)
        if isinstance(message, StopEngine):
            self.kill()
        self.notify()

    async def send_with(self, message, descriptors) -> None:
        assert descriptors
        self.send(message)

    def step(self, *runs: TokenRun, kv_blocks: int = 0, kv_used_blocks: int = 0) -> None:
        done = step_of(*runs)
        kv = {"kv_blocks": kv_blocks, "kv_used_blocks": kv_used_blocks}
        self._steps.put_nowait(msgspec.structs.replace(done, **kv))

    async def __aiter__(self):
        while (step := await self._steps.get()) is not None:
            yield step

    async def wait_exit(self) -> int:
        await self._gone.wait()
        return 0

    def kill(self) -> None:
        if not self.is_gone:
            self._gone.set()
            self._steps.put_nowait(None)
            self.notify()


class FakeSpawner(Watched):
    """Spawns `FakeEngine`s; `failures` are raised by the next engines' start."""

    def __init__(self) -> None:
        super().__init__()
        self.engines: list[FakeEngine] = []
        self.starts: list[StartEngine] = []
        self.failures: list[GearfallError] = []
        self.needs_pool = True

    async def spawn(self, start: StartEngine, partition_fds) -> FakeEngine:
        self.starts.append(start)
        error = self.failures.pop(0) if self.failures else None
        engine = FakeEngine(100 + len(self.engines), error, needs_pool=self.needs_pool)
        self.engines.append(engine)
        self.notify()
        return engine

    async def engine(self, index: int) -> FakeEngine:
        await self.until(lambda: len(self.engines) > index)
        return self.engines[index]


class FakeLease:
    manifest_json = b"{}"
    partition_fds = ()
    news_fd = None

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class FakeStore:
    """A store that has every model resident; `failures` are raised by the next loads."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.wanted_unix_s: list[float] = []
        self.leases: list[FakeLease] = []
        self.failures: list[GearfallError] = []

    async def load_model(
        self, model, on_leasable=None, *, wanted_unix_s=0.0, on_begun=lambda: None
    ) -> LoadedModel:
        self.loads.append(model)
        self.wanted_unix_s.append(wanted_unix_s)
        if self.failures:
            raise self.failures.pop(0)
        on_begun()
        return LoadedModel("d" * 32, "/run/s.sock", StartTimeline(ssd_s=0.2, from_tier=Tier.DRAM))

    async def read_file(self, model, file) -> bytes:
        if file == "generation_config.json":
            raise NotFound("no such file")
        return b'{"model_type": "llama"}'

    async def read_canary(self, model) -> bytes:
        return b"{}"

    async def take_lease(
        self, socket_path, model, digest, holder, *, accepts_filling=False
    ) -> FakeLease:
        if socket_path != "/run/s.sock":
            raise Unavailable("no store there")
        self.leases.append(FakeLease())
        return self.leases[-1]


class FakeRouter(Watched, router_pb2_grpc.TokenSinkServicer):
    """A router over real gRPC that notes what it hears and says what a test tells it."""

    def __init__(self, router_id=ROUTER) -> None:
        super().__init__()
        self.router_id = router_id
        self.heard: list[pb.WorkerPush] = []
        self.connections = 0
        self.is_silent = False
        self.address = ""
        self._calls: list[asyncio.Queue[pb.RouterReply | None]] = []

    async def start(self, stack: AsyncExitStack, listen="127.0.0.1:0") -> "FakeRouter":
        self._server = await start_server(
            listen,
            lambda s: router_pb2_grpc.add_TokenSinkServicer_to_server(self, s),
            ("gearfall.v1.TokenSink",),
        )
        self.address = self._server.address
        stack.push_async_callback(self.stop)
        return self

    async def stop(self) -> None:
        self.hang_up()
        await self._server.stop(0.0)

    async def Push(self, request_iterator, context):
        replies: asyncio.Queue[pb.RouterReply | None] = asyncio.Queue()
        self._calls.append(replies)
        self.connections += 1
        listener = asyncio.create_task(self._listen(request_iterator, replies))
        try:
            while (reply := await replies.get()) is not None:
                yield reply
        finally:
            listener.cancel()
            self._calls.remove(replies)
            self.notify()

    async def _listen(self, pushes, replies) -> None:
        try:
            async for push in pushes:
                self.heard.append(push)
                if push.WhichOneof("push") == "hello" and not self.is_silent:
                    hello = pb.RouterHello(router_id=self.router_id)
                    replies.put_nowait(pb.RouterReply(hello=hello))
                self.notify()
        except (grpc.RpcError, asyncio.CancelledError):
            pass
        finally:
            replies.put_nowait(None)

    def hang_up(self) -> None:
        for call in self._calls:
            call.put_nowait(None)

    def reply_stop(self, a_job: Job) -> None:
        self._reply(stop=pb.JobStop(job_id=a_job.job_id, epoch=a_job.epoch, reason="test"))

    def reply_finished(self, a_job: Job) -> None:
        finished = pb.JobFinished(job_id=a_job.job_id, epoch=a_job.epoch)
        self._reply(finished=pb.JobsFinished(jobs=[finished]))

    def _reply(self, **fields) -> None:
        self._calls[-1].put_nowait(pb.RouterReply(**fields))

    @property
    def claims(self) -> list[tuple[str, int]]:
        alone = (push.claim for push in self.heard if push.HasField("claim"))
        with_steps = (claim for push in self.heard for claim in push.step.claims)
        return [(each.job_id, each.epoch) for each in (*alone, *with_steps)]

    @property
    def lost(self) -> list[tuple[str, int]]:
        return [(p.lost.job_id, p.lost.epoch) for p in self.heard if p.WhichOneof("push") == "lost"]

    @property
    def steps(self) -> list[list[tuple[str, int]]]:
        return [
            [(run.job_id, run.index) for run in p.step.runs]
            for p in self.heard
            if p.WhichOneof("push") == "step"
        ]


FINISH = FinishReason.STOP
