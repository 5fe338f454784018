"""Bare connections to a real server: order, errors, scripts, and what ends one."""

import asyncio

import pytest
from redis import exceptions
from redis.asyncio import Redis

from gearfall.infra.queue.redis_wire import Wires


@pytest.fixture
async def redis(redis_server):
    client = Redis.from_url(redis_server.url, protocol=2)
    yield client
    await client.flushall()
    await client.aclose()


@pytest.fixture
async def wires(redis):
    wires = Wires(redis.connection_pool)
    yield wires
    wires.close()


async def connections(redis):
    """Clients that the server has, the one that asks included."""
    return int((await redis.info("clients"))["connected_clients"])


async def test_replies_come_in_the_order_of_the_commands_errors_among_them(wires):
    commands = [("SET", "a", 7), ("GET", "a"), ("INCR", "a"), ("NONSENSE",), ("GET", b"a")]
    *good, wrong, last = await wires.call_all(commands)
    assert good == [b"OK", b"7", 8]
    assert isinstance(wrong, exceptions.ResponseError)
    assert last == b"8"
    with pytest.raises(exceptions.ResponseError, match="NONSENSE"):
        await wires.call("NONSENSE")
    assert await wires.call("GET", "a") == b"8"


async def test_values_of_any_bytes_and_size_come_back_whole(wires):
    value = bytes(range(256)) * 4000
    await wires.call("SET", "a", value)
    assert await wires.call("GET", "a") == value
    assert await wires.call("GET", "nothing") is None


async def test_a_script_is_known_from_its_first_run_on(wires, redis):
    text = "return {KEYS[1], ARGV[1], ARGV[2]}"
    for _ in range(2):
        assert await wires.script(text, ["k"], ["x", 5]) == [b"k", b"x", b"5"]
    await redis.script_flush()
    assert await wires.script(text, ["k"], ["x", 5]) == [b"k", b"x", b"5"]


async def test_one_connection_serves_callers_after_each_other_more_those_at_once(wires, redis):
    before = await connections(redis)
    for _ in range(5):
        await wires.call("PING")
    assert await connections(redis) == before + 1
    await asyncio.gather(*(wires.call("BLPOP", f"none{n}", "0.05") for n in range(3)))
    assert await connections(redis) == before + 3


async def test_a_cancelled_call_ends_its_connection_and_no_other(wires, redis):
    await wires.call("PING")
    before = await connections(redis)
    waiting = asyncio.create_task(wires.call("BLPOP", "list", 0))
    async with asyncio.timeout(5):
        while (await redis.info("clients"))["blocked_clients"] != 1:
            pass
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(5):
        while await connections(redis) != before - 1:
            pass
    await redis.rpush("list", "kept")
    assert await wires.call("LPOP", "list") == b"kept", "the cancelled call took nothing"


async def test_a_lost_connection_fails_what_waits_and_is_opened_anew(wires, redis):
    await wires.call("PING")
    calls = [asyncio.create_task(wires.call_all([("BLPOP", "list", 0), ("PING",)]))]
    async with asyncio.timeout(5):
        while (await redis.info("clients"))["blocked_clients"] != 1:
            pass
    await redis.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(exceptions.ConnectionError):
        await calls[0]
    assert await wires.call("PING") == b"PONG"


async def test_closing_fails_what_waits(wires, redis):
    waiting = asyncio.create_task(wires.call("BLPOP", "list", 0))
    async with asyncio.timeout(5):
        while (await redis.info("clients"))["blocked_clients"] != 1:
            pass
    wires.close()
    with pytest.raises(exceptions.ConnectionError):
        await waiting


async def test_none_is_opened_once_they_are_closed(wires, redis):
    before = await connections(redis)
    opening = asyncio.create_task(wires.call("PING"))
    await asyncio.sleep(0)
    wires.close()
    with pytest.raises(exceptions.ConnectionError, match="closed"):
        await opening
    with pytest.raises(exceptions.ConnectionError, match="closed"):
        await wires.call("PING")
    async with asyncio.timeout(5):
        while await connections(redis) != before:
            pass
