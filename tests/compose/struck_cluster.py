"""A client of a cluster in containers: it reads answers while containers are struck."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from gearfall.client import AsyncClient, Finished, TextDelta
from gearfall.client.request import Options
from gearfall.core.errors import GearfallError
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.pb import common_pb2, router_pb2
from tests.compose.compose_cluster import Containers
from tests.compose.models import SEEN_BY_STORES, WANDERER

T = TypeVar("T")

TOKENS = 500
PROMPT_IDS = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 6
GREEDY = Options(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=True)
STRIKE_AT = 100
"""Token from which on a container is struck."""
_DEMO_IN_IMAGE = "/opt/demo"
_WITHIN_S = 60.0
_LOOK_AGAIN_S = 0.05

Strike = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Received:
    """A whole answer."""

    token_ids: tuple[int, ...]
    text: str
    owners: int
    """Workers that had the job one after another."""


class StruckCluster:
    """Both nodes serve one model; the undisturbed answer is known."""

    _reference: Received | None = None

    def __init__(self, containers: Containers, client: AsyncClient) -> None:
        self.containers = containers
        self.client = client

    async def prepare(self) -> None:
        """Register and deploy the model, once, and return when both workers serve it."""
        names = {model.name for model in (await self.client.models()).models}
        if WANDERER not in names:
            await self.register(WANDERER, str(SEEN_BY_STORES / WANDERER))
            stages = (Stage(ModelName(WANDERER)),)
            pair = DeploymentRecord(DeploymentName("pair"), stages, min_replicas=2, max_replicas=2)
            await self.client.deploy(pair)
        await self.until(self.status, lambda status: len(ready_on(status, WANDERER)) == 2)

    async def reference(self) -> Received:
        """Return the undisturbed answer."""
        if StruckCluster._reference is None:
            StruckCluster._reference = await self.read()
            assert StruckCluster._reference.owners == 1
            assert len(StruckCluster._reference.token_ids) == TOKENS
        return StruckCluster._reference

    async def read(self, strike: Strike | None = None, *, tokens: int = TOKENS) -> Received:
        """Stream one answer to its end; do `strike` beside it from token `STRIKE_AT` on."""
        options: Options = {**GREEDY, "max_tokens": tokens}
        ids: list[int] = []
        text, owners, beside = "", 0, None
        async for event in self.client.stream(WANDERER, PROMPT_IDS, **options):
            if isinstance(event, TextDelta):
                text += event.text
                ids += [item.token_id for item in event.logprobs]
                if strike is not None and beside is None and len(ids) >= STRIKE_AT:
                    beside = asyncio.ensure_future(strike())
            elif isinstance(event, Finished):
                owners = event.stages[-1].epochs
        if beside is not None:
            await beside
        return Received(tuple(ids), text, owners)

    async def check_same(self, strike: Strike) -> Received:
        """Read an answer while `strike` is done; assert that it is the undisturbed one."""
        expected = await self.reference()
        got = await self.read(strike)
        assert (got.token_ids, got.text) == (expected.token_ids, expected.text)
        return got

    async def owner(self) -> str:
        """Return the service (worker-1) that runs the only job."""

        def owners(status: router_pb2.GetStatusReply) -> list[str]:
            return [
                worker.address.partition(":")[0]
                for worker in status.workers
                for replica in worker.replicas
                if replica.model == WANDERER and replica.running_jobs > 0
            ]

        (owner,) = owners(await self.until(self.status, lambda status: len(owners(status)) == 1))
        return owner

    async def leader(self) -> str:
        """Return the service (scheduler-1) that leads."""
        leader = (await self.until(self.status, lambda status: bool(status.leader))).leader
        for service in ("scheduler-1", "scheduler-2"):
            lines = await asyncio.to_thread(self.containers.log_lines, service)
            if any(line.get("scheduler_id") == leader for line in lines if line.get("ready")):
                return service
        raise AssertionError(f"{leader} is neither of the two schedulers")

    async def answer_cold(self, name: str) -> str:
        """Register a model under a new name and return its first answer to 2+3."""
        await self.register(name, f"{_DEMO_IN_IMAGE}/arith-small")
        return (await self.client.generate(name, "2+3=", temperature=0.0, max_tokens=8)).text

    async def register(self, name: str, path: str) -> None:
        """Register a model by the path at which stores see it."""
        async with asyncio.timeout(_WITHIN_S):
            _ = [item async for item in self.client.register_model(name, path)]

    async def status(self) -> router_pb2.GetStatusReply:
        """The cluster as the router sees it."""
        return await self.client.status()

    async def check_nothing_is_left(self) -> None:
        """Assert that within a minute no job waits, is claimed or runs, and nothing is amiss."""

        async def look() -> list[str]:
            return leftovers(await self.status())

        try:
            left = await self.until(look, lambda left: not left)
        except TimeoutError:
            left = await look()
        assert not left

    async def until(self, look: Callable[[], Awaitable[T]], is_enough: Callable[[T], bool]) -> T:
        """Return what `look` finds once it is enough; errors of the cluster are looked at again."""
        async with asyncio.timeout(_WITHIN_S):
            while True:
                try:
                    found = await look()
                except GearfallError:
                    pass
                else:
                    if is_enough(found):
                        return found
                await asyncio.sleep(_LOOK_AGAIN_S)


def ready_on(status: router_pb2.GetStatusReply, model: str) -> set[str]:
    """Return the services (worker-1) whose replica of a model is ready."""
    return {
        worker.address.partition(":")[0]
        for worker in status.workers
        for replica in worker.replicas
        if replica.model == model and replica.state == common_pb2.REPLICA_STATE_READY
    }


def replicas_of(status: router_pb2.GetStatusReply, model: str) -> list[common_pb2.Replica]:
    """Return a model's replicas, ready or not."""
    return [r for worker in status.workers for r in worker.replicas if r.model == model]


def leftovers(status: router_pb2.GetStatusReply) -> list[str]:
    """Say what a cluster at rest with both its nodes has not."""
    left = [f"degraded: {words}" for words in status.degraded]
    left += [
        f"{queue.model}: {queue.waiting} waiting, {queue.claimed} claimed"
        for queue in status.queues
        if queue.waiting or queue.claimed
    ]
    left += [
        f"{replica.model}: {replica.running_jobs} jobs on {worker.address}"
        for worker in status.workers
        for replica in worker.replicas
        if replica.running_jobs
    ]
    if status.running_requests:
        left.append(f"{status.running_requests} requests")
    if (len(status.nodes), len(status.workers)) != (2, 2):
        left.append(f"{len(status.nodes)} nodes, {len(status.workers)} workers")
    return left
