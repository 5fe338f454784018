"""The queue's server dies and has forgotten its last moments: no entry stays behind for ever.

Its log is synced each second, and while the disk is busy it answers before it has written. So what
was acknowledged just before it died can be claimed again, by a worker that has done with it and
whose calls never broke off, as it was full.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from gearfall.client import AsyncClient, TextDelta
from gearfall.demo import catalogue
from gearfall.infra.failpoints import DIRECTORY_VARIABLE
from gearfall.pb import router_pb2
from tests.cluster_host import ClusterHost, kill
from tests.faults.fault_cluster import until

MODEL = "arith-small"
TOKENS = 120
SLOW = "engine.decode=delay:0.2"
"""So that answers are on their way while the server dies and comes back."""


@pytest.fixture(scope="module")
def full_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterHost]:
    """A cluster whose only worker is full with one job."""
    environment = {DIRECTORY_VARIABLE: str(tmp_path_factory.mktemp("points"))}
    host = ClusterHost(tmp_path_factory.mktemp("full"), *("--slots", "1"), environment=environment)
    yield host
    assert host.stop() == 0


@pytest.fixture
async def client(full_worker: ClusterHost) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(full_worker.addresses["grpc"]) as opened:
        source = str(catalogue.checkpoint_path(MODEL))
        _ = [item async for item in opened.register_model(MODEL, source)]
        yield opened


async def read(client: AsyncClient, begun: asyncio.Event) -> str:
    """Return a whole answer; say when it has begun."""
    text = ""
    async for event in client.stream(
        MODEL, "12+34=", temperature=0.0, max_tokens=TOKENS, ignore_eos=True
    ):
        if isinstance(event, TextDelta):
            text += event.text
            begun.set()
    return text


async def end_log(url: str) -> None:
    """Have the server go on without writing anything down."""
    async with Redis.from_url(url) as redis:
        await redis.config_set("appendonly", "no")


def counts(status: router_pb2.GetStatusReply) -> list[tuple[int, int]]:
    """What waits and what is claimed, by queue."""
    return [(queue.waiting, queue.claimed) for queue in status.queues]


async def test_an_entry_that_was_acknowledged_in_the_last_moment_is_settled_again(
    full_worker: ClusterHost, client: AsyncClient
) -> None:
    first_began, second_began = asyncio.Event(), asyncio.Event()
    full_worker.arm(SLOW)
    first = asyncio.create_task(read(client, first_began))
    async with asyncio.timeout(60):
        await first_began.wait()
        second = asyncio.create_task(read(client, second_began))
        await until(client.status, lambda status: counts(status) == [(1, 1)])
        await end_log(full_worker.facts.redis_url)
        first.cancel()  # a client that goes ends its job
        await second_began.wait()
        await until(client.status, lambda status: counts(status) == [(0, 1)])
        struck = full_worker.service("redis").pid
        kill(struck)

        async def came_back() -> bool:
            facts = full_worker.service("redis")
            return facts.state == "ready" and facts.pid not in {0, struck}

        await until(came_back, bool)
        # It remembers the first as claimed and the second as waiting.
        await until(client.status, lambda status: counts(status) == [(1, 1)])
        assert not second.done(), "the worker was full all the while"
        full_worker.arm()
        text = await second
        await until(client.status, lambda status: counts(status) == [(0, 0)])
        assert await read(client, asyncio.Event()) == text
