"""Kept connections to real gRPC servers that die, come back and go silent."""

import asyncio
import socket

import pytest

from gearfall.core.ids import WorkerId
from gearfall.infra.net.grpc_server import start_server
from services.scheduler.worker_links import WorkerLinks

A, B = WorkerId("a"), WorkerId("b")


class Watched:
    """Links with short times, and a way to wait for what they find."""

    def __init__(self, **times) -> None:
        self._changed = asyncio.Event()
        times = {"connect_timeout_s": 0.5, "retry_s": 0.01, "steady_s": 0.05, **times}
        self.links = WorkerLinks(self._changed.set, **times)

    async def until_down(self, worker_id, is_down=True):
        async with asyncio.timeout(10):
            while self.links.is_down(worker_id) is not is_down:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def watched():
    made = Watched()
    yield made
    await made.links.stop()


async def serve(listen="127.0.0.1:0"):
    return await start_server(listen, lambda _: None, ())


async def test_a_worker_that_dies_is_down_and_up_again_when_it_serves(watched):
    server = await serve()
    watched.links.follow({A: server.address}, ())
    await server.stop(0)
    await watched.until_down(A)
    again = await serve(server.address)
    await watched.until_down(A, is_down=False)
    await again.stop(0)


async def test_only_the_dead_one_is_down(watched):
    first, second = await serve(), await serve()
    watched.links.follow({A: first.address, B: second.address}, ())
    await first.stop(0)
    await watched.until_down(A)
    assert not watched.links.is_down(B)
    await second.stop(0)


async def test_a_listener_that_never_answers_is_down():
    watched = Watched(connect_timeout_s=0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        watched.links.follow({A: f"127.0.0.1:{silent.getsockname()[1]}"}, ())
        await watched.until_down(A)
        await watched.links.stop()


async def test_unknown_and_forgotten_workers_are_not_down(watched):
    assert not watched.links.is_down(A)
    watched.links.follow({A: "127.0.0.1:1"}, ())
    await watched.until_down(A)
    watched.links.follow({}, {A})
    assert watched.links.is_down(A)
    watched.links.follow({}, ())
    assert not watched.links.is_down(A)
