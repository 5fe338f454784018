"""How many commands a claim costs the server, and that few of them change no order."""

import asyncio

import pytest
from redis.asyncio import Redis

from gearfall.infra.queue.redis_queue import RedisQueue
from tests.integration.queue_jobs import MODEL, chat, job


@pytest.fixture
async def redis(redis_server):
    client = Redis.from_url(redis_server.url, protocol=2)
    yield client
    await client.flushall()
    await client.aclose()


@pytest.fixture
async def queue(redis_server):
    queue = RedisQueue(redis_server.url, key_prefix="reads:")
    yield queue
    await queue.close()


async def reads(redis):
    stats = await redis.info("commandstats")
    return stats["cmdstat_xreadgroup"]["calls"] if "cmdstat_xreadgroup" in stats else 0


async def blocked(redis):
    async with asyncio.timeout(5):
        while (await redis.info("clients"))["blocked_clients"] != 1:
            pass


async def claim(queue, max_jobs):
    found = await queue.claim(MODEL, "w1", max_jobs=max_jobs, block_s=5.0)
    return [entry.job for entry in found]


async def test_a_steady_trickle_costs_one_read_a_job(queue, redis):
    await queue.append(job(0))
    assert await claim(queue, 4) == [job(0)]
    waiting = asyncio.create_task(claim(queue, 4))
    await blocked(redis)
    await queue.append(chat(1))
    assert await waiting == [chat(1)]
    before = await reads(redis)
    for number in range(2, 8):
        waiting = asyncio.create_task(claim(queue, 4))
        await blocked(redis)
        await queue.append(job(number))
        assert await waiting == [job(number)]
    # On a machine that stops for a hundredth of a second in between, a look comes first.
    assert (await reads(redis)) - before < 2 * 6


async def test_who_has_room_for_one_looks_before_it_waits(queue, redis):
    waiting = asyncio.create_task(claim(queue, 1))
    await blocked(redis)
    await queue.append(job(0))
    assert await waiting == [job(0)]
    await queue.append(job(1))
    await queue.append(chat(2))
    assert await claim(queue, 1) == [chat(2)]
    assert await claim(queue, 1) == [job(1)]


async def test_what_came_a_while_after_the_last_claim_is_claimed_in_order(queue, redis):
    waiting = asyncio.create_task(claim(queue, 4))
    await blocked(redis)
    await queue.append(job(0))
    assert await waiting == [job(0)]
    for each in (job(1), job(2), chat(3), chat(4)):
        await queue.append(each)
    until_s = asyncio.get_running_loop().time() + 0.02
    while asyncio.get_running_loop().time() < until_s:
        await redis.ping()
    assert await claim(queue, 2) == [chat(3), chat(4)]
