"""One stream of server-sent events without a server: what it says while there is nothing to say."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest

from gearfall.core.errors import Overloaded
from gearfall.core.ids import RequestId
from services.router.doors.rest_answers import DONE, ChatShape
from services.router.doors.sse import EventStream, first_batch
from services.router.generation import Delta, GenerationEvent
from services.router.running_request import RunningRequest
from tests.services.router.virtual_time import run_virtually

Message = MutableMapping[str, Any]


class Client:
    """Takes what is sent; leaves when told."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.has_pulse, self.leaves = asyncio.Event(), asyncio.Event()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])
            if message["body"].startswith(b":"):
                self.has_pulse.set()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def request() -> RunningRequest:
    return RunningRequest(
        RequestId("r"), deployment="small", seed=1, choices=1, on_end=lambda _: None
    )


def stream(
    running: RunningRequest, batches: AsyncIterator[list[GenerationEvent]], pulse_s: float
) -> EventStream:
    shape = ChatShape(request_id="r", model="small", created_unix_s=0, with_logprobs=False)
    return EventStream(
        running, batches, (), shape, n=1, wants_usage=False, headers={}, pulse_s=pulse_s
    )


async def test_a_silent_stream_tells_that_it_lives_and_ends_well() -> None:
    client, running = Client(), request()

    async def batches() -> AsyncIterator[list[GenerationEvent]]:
        await client.has_pulse.wait()
        yield [Delta(0, "hello")]

    async with asyncio.timeout(10):
        await stream(running, batches(), 0.001)({}, client.receive, client.send)
    assert client.bodies[0].startswith(b": ")
    assert client.bodies[0].endswith(b"\n\n")
    assert b"hello" in b"".join(client.bodies)
    assert client.bodies[-1] == b""


async def test_a_client_that_leaves_a_silent_stream_ends_its_request() -> None:
    client, running = Client(), request()
    answering = asyncio.create_task(
        stream(running, running.batches(), 0.001)({}, client.receive, client.send)
    )
    async with asyncio.timeout(10):
        await client.has_pulse.wait()
        client.leaves.set()
        await answering
    assert DONE not in b"".join(client.bodies)


def test_a_stream_that_speaks_more_often_than_it_would_pulse_has_no_pulse() -> None:
    async def batches() -> AsyncIterator[list[GenerationEvent]]:
        for _ in range(10):
            await asyncio.sleep(0.4)  # of virtual time
            yield [Delta(0, "hello")]

    async def main() -> None:
        client = Client()
        await stream(request(), batches(), 1.0)({}, client.receive, client.send)
        assert b"".join(client.bodies).count(b"hello") == 10
        assert not client.has_pulse.is_set()

    run_virtually(main())


def test_a_stream_that_is_silent_from_the_start_is_opened_and_ends_well() -> None:
    async def main() -> None:
        client, running = Client(), request()
        first, batches = await first_batch(client.receive, running, 60.0)
        assert first == []
        running.emit(Delta(0, "hello"))
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, running.emit, Delta(0, "again"))
        loop.call_later(2.0, running.fail, Overloaded("too late for a status"))
        await stream(running, batches, 60.0)({}, client.receive, client.send)
        said = b"".join(client.bodies)
        assert said.index(b"hello") < said.index(b"again") < said.index(b"too late for a status")
        assert said.endswith(DONE)

    run_virtually(main())


async def test_what_fails_before_the_first_event_is_raised() -> None:
    client, running = Client(), request()
    asyncio.get_running_loop().call_soon(running.fail, Overloaded("full"))
    with pytest.raises(Overloaded, match="full"):
        await first_batch(client.receive, running)


async def test_a_client_that_leaves_before_the_first_event_ends_its_request() -> None:
    client, running = Client(), request()
    client.leaves.set()
    async with asyncio.timeout(10):
        first, batches = await first_batch(client.receive, running)
        assert first == []
        assert [batch async for batch in batches] == []
