"""A local cluster whose processes can be struck at named points, and whose run is judged."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gearfall.client import AsyncClient, Finished, TextDelta
from gearfall.client.request import Options
from gearfall.core.errors import GearfallError
from gearfall.core.generation.history import Answered
from gearfall.core.generation.streaming import Streaming
from gearfall.core.generation.usage import StageReport
from gearfall.core.generation.verdict import Verdict, judge
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.demo import catalogue
from gearfall.infra.failpoints import DIRECTORY_VARIABLE, REACHED_FILE
from gearfall.infra.history_log import (
    HISTORY_VARIABLE,
    HistoryLog,
    alive_pids,
    ask_what_is_held,
    read_histories,
)
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.pb import common_pb2
from gearfall.pb import worker_pb2 as pb
from gearfall.pb.worker_pb2_grpc import WorkerStub
from tests.cluster_host import ClusterHost
from tests.e2e.test_migration import wanderer

T = TypeVar("T")

MODEL = ModelName("wanderer")
PROMPT_IDS = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 20
TOKENS = 700
GREEDY = Options(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=True)
SAMPLED = Options(temperature=1.0, seed=11, max_tokens=TOKENS, ignore_eos=True, logprobs=True)
WAIT_S = 60.0
"""Longest that anything here is waited for; a test that needs it has failed."""
VERDICT_WITHIN_S = 20.0
"""Longest until nothing is under way any more: routers that died are given up after ten."""
_LOOK_AGAIN_S = 0.02
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Received:
    """What a client got."""

    token_ids: tuple[int, ...]
    owners: int
    """0 when the answer did not end."""
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """One worker that hosts the model."""

    worker_id: str
    address: str
    pid: int
    engine_pid: int


class FaultCluster:
    """Two workers on one node, both with a ready replica, all processes writing histories."""

    def __init__(self, home: Path, *flags: str) -> None:
        """Start the processes, with more flags of `gearfall up`; `connected` opens it for use."""
        self.points = home / "points"
        self.histories = home / "histories"
        self.reference: Received | None = None
        """The undisturbed answer, once somebody has read it."""
        self.source = home / "source"
        for directory in (self.points, self.histories):
            directory.mkdir(parents=True)
        wanderer().save_pretrained(self.source)
        shutil.copy(catalogue.checkpoint_path("arith-small") / "tokenizer.json", self.source)
        self.log = HistoryLog(self.histories, "client")
        self._struck_before = 0
        environment = {
            DIRECTORY_VARIABLE: str(self.points),
            HISTORY_VARIABLE: str(self.histories),
        }
        self.host = ClusterHost(
            home / "cluster", "--workers-per-node", "2", *flags, environment=environment
        )

    def close(self) -> Verdict:
        """Stop the cluster and return the verdict on its whole run."""
        status = self.host.stop()
        self.log.close()
        assert status == 0
        histories = read_histories(self.histories)
        return judge(histories, alive_pids(histories) - {os.getpid()})

    def pid_of(self, service: str) -> int:
        """Return the process of a service that runs once."""
        return self.host.service(service).pid

    def arm(self, *rules: str) -> None:
        """Put these rules in force in all processes, in place of those before."""
        self._struck_before = len(self._lines())
        self.host.arm(*rules)

    async def struck(self, point: str) -> int:
        """Wait until a rule in force fired, which must be at `point`; return who passed it.

        A job's release comes up to a tenth of a second behind its answer's end.
        """

        async def look() -> list[str]:
            return self._lines()[self._struck_before :]

        line: dict[str, str] = json.loads((await until(look, bool))[-1])
        assert line["point"] == point
        return int(line["pid"])

    def last_struck(self) -> int:
        """Return the process that passed the point of the last rule that fired."""
        return int(self._last_line()["pid"])

    def last_struck_point(self) -> str:
        """Return the point of the last rule that fired."""
        return self._last_line()["point"]

    def has_struck(self, point: str, job_id: str) -> bool:
        """Whether a rule fired for a job at a point."""
        facts = map(json.loads, self._lines())
        return any((each["point"], each["job"]) == (point, job_id) for each in facts)

    def _last_line(self) -> dict[str, str]:
        line: dict[str, str] = json.loads(self._lines()[-1])
        return line

    def _lines(self) -> list[str]:
        path = self.points / REACHED_FILE
        return path.read_text().splitlines() if path.exists() else []

    @asynccontextmanager
    async def connected(self) -> AsyncIterator["FaultClient"]:
        """A client of the cluster, with the model served by both workers."""
        async with AsyncClient(self.host.addresses["grpc"]) as client:
            opened = FaultClient(self, client, self.log)
            await opened.prepare(self.source)
            yield opened


class FaultClient:
    """Asks, moves and judges on one event loop."""

    def __init__(self, cluster: FaultCluster, client: AsyncClient, log: HistoryLog) -> None:
        self.client = client
        self._cluster = cluster
        self._log = log

    async def prepare(self, source: Path) -> None:
        """Register the model, once, and return when both workers serve it."""
        await until(self._models, lambda _: True)
        if MODEL not in await self._models():
            async for _ in self.client.register_model(MODEL, str(source)):
                pass
            name, stages = DeploymentName("pair"), (Stage(MODEL),)
            await self.client.deploy(DeploymentRecord(name, stages, min_replicas=2, max_replicas=2))
        await self.both_ready()

    async def _models(self) -> set[str]:
        return {model.name for model in (await self.client.models()).models}

    async def both_ready(self) -> tuple[WorkerProcess, ...]:
        """Return the two workers, once both serve the model and every process is there."""
        await until(self._ready_workers, lambda found: len(found) == 2)
        await until(self._are_all_up, bool)
        return await until(self._ready_workers, lambda found: len(found) == 2)

    async def _are_all_up(self) -> bool:
        return all(facts.state == "ready" for facts in self._cluster.host.facts.services)

    async def _ready_workers(self) -> tuple[WorkerProcess, ...]:
        pids = {f.address: f.pid for f in self._cluster.host.facts.services if f.pid}
        return tuple(
            WorkerProcess(worker.worker_id, worker.address, pids[worker.address], replica.pid)
            for worker in (await self.client.status()).workers
            for replica in worker.replicas
            if replica.model == MODEL
            and replica.state == common_pb2.REPLICA_STATE_READY
            and worker.address in pids
        )

    async def read(
        self, options: Options, *, at: int = 0, then: Callable[[], Awaitable[None]] | None = None
    ) -> Received:
        """Stream one answer to its end; do `then` beside it from token `at` on.

        What came is written down and returned, an error of the cluster too; one of `then` is
        raised.
        """
        ids: list[int] = []
        owners, error, beside = 0, None, None
        try:
            async for event in self.client.stream(MODEL, PROMPT_IDS, **options):
                if isinstance(event, TextDelta):
                    ids += [item.token_id for item in event.logprobs]
                    if then is not None and beside is None and len(ids) >= at:
                        beside = asyncio.ensure_future(then())
                elif isinstance(event, Finished):
                    owners = event.stages[-1].epochs
        except GearfallError as caught:
            error = caught
        self._log.write(Answered(repr(sorted(options.items())), tuple(ids), owners > 0))
        if beside is not None:
            await beside
        return Received(tuple(ids), owners, error)

    async def stand_above(self, name: str, source: Path) -> None:
        """Register the model once more, and "upward", where its every answer goes to that one."""
        if name in await self._models():
            return
        async for _ in self.client.register_model(name, str(source)):
            pass
        stages = (Stage(MODEL, 1.0), Stage(ModelName(name)))
        streaming = Streaming(finishes_drafts=True)
        await self.client.deploy(
            DeploymentRecord(DeploymentName("upward"), stages, streaming=streaming)
        )

    async def ask(
        self, model: str, options: Options
    ) -> tuple[tuple[int, ...], tuple[StageReport, ...]]:
        """Return an answer's tokens and what its stages did."""
        ids: list[int] = []
        stages: tuple[StageReport, ...] = ()
        async for event in self.client.stream(model, PROMPT_IDS, **options):
            if isinstance(event, TextDelta):
                ids += [item.token_id for item in event.logprobs]
            elif isinstance(event, Finished):
                stages = event.stages
        return tuple(ids), stages

    async def owner(self) -> tuple[WorkerProcess, WorkerProcess, pb.RunningJob]:
        """Return the worker that has the only running job, the other one, and the job."""
        pair = await self._ready_workers()
        for worker in pair:
            async with open_channel(worker.address) as channel:
                status = await WorkerStub(channel).GetStatus(
                    pb.WorkerStatusRequest(), timeout=_ANSWER_S
                )
            if status.jobs:
                (other,) = (each for each in pair if each is not worker)
                return worker, other, status.jobs[0]
        raise AssertionError("the job runs nowhere")

    async def move(
        self, source: WorkerProcess, target: WorkerProcess, job: pb.RunningJob
    ) -> pb.MigrateJobReply:
        """Move a job from worker to worker; raises grpc's error when it stays."""
        request = pb.MigrateJobRequest(job_id=job.job_id, target_address=target.address)
        async with open_channel(source.address) as channel:
            reply: pb.MigrateJobReply = await WorkerStub(channel).MigrateJob(
                request, timeout=_ANSWER_S
            )
        return reply

    async def verdict(self) -> Verdict:
        """Judge what has happened so far, as soon as nothing is under way any more."""

        async def look() -> Verdict:
            self._log.write_holding()
            await asyncio.to_thread(ask_what_is_held, self._cluster.histories, timeout_s=_ANSWER_S)
            histories = read_histories(self._cluster.histories)
            return judge(histories, alive_pids(histories) - {os.getpid()}, is_stopped=False)

        try:
            return await until(look, lambda verdict: verdict.is_sound, VERDICT_WITHIN_S)
        except TimeoutError:
            return await look()


async def until(
    look: Callable[[], Awaitable[T]], is_enough: Callable[[T], bool], within_s: float = WAIT_S
) -> T:
    """Return what `look` finds once it is enough; errors of the cluster are looked at again."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                found = await look()
            except GearfallError:
                pass
            else:
                if is_enough(found):
                    return found
            await asyncio.sleep(_LOOK_AGAIN_S)


def thaw(pid: int) -> None:
    """Let a stopped process go on. One that has ended meanwhile is left alone."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return
