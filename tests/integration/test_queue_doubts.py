"""Entries that a consumer has without knowing: each is found, by calls side by side as by one."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from gearfall.core.errors import Unavailable
from gearfall.core.generation.job import Priority
from gearfall.infra.local.local_servers import LocalServer
from gearfall.infra.queue.redis_lanes import GROUP, stream_key
from gearfall.infra.queue.redis_queue import RedisQueue
from tests.integration.queue_jobs import MODEL, chat, claim, ids, job

PREFIX = "doubts:"


@pytest.fixture
async def redis(redis_server: LocalServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_server.url, protocol=2) as client:
        yield client
        await client.flushall()


@pytest.fixture
async def queue(redis_server: LocalServer, redis: Redis) -> AsyncIterator[RedisQueue]:
    """One whose calls by `w1` broke off just now, and what they left turns up at once."""
    queue = RedisQueue(redis_server.url, key_prefix=PREFIX, settle_s=0.0)
    waiting = asyncio.create_task(claim(queue, "w1", block_s=20))
    async with asyncio.timeout(5):
        while (await redis.info("clients"))["blocked_clients"] != 1:
            pass
    await redis.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(Unavailable):
        await waiting
    yield queue
    await queue.close()


async def hand_out(redis: Redis, lane: Priority) -> None:
    """Give `w1` what is in a lane, as a call does whose reply is lost."""
    await redis.xreadgroup(GROUP.decode(), "w1", {stream_key(PREFIX, MODEL, lane): ">"})


async def scripts(redis: Redis) -> int:
    """How many the server has run."""
    return int((await redis.info("commandstats"))["cmdstat_evalsha"]["calls"])


async def test_calls_side_by_side_settle_a_doubt_together(queue: RedisQueue) -> None:
    results = await asyncio.gather(
        claim(queue, "w1"),
        queue.claim(MODEL, "w1", max_jobs=1, max_batch_jobs=0, block_s=0),
        queue.reclaim(MODEL, "w1", alive=frozenset(), max_jobs=1),
    )
    assert [list(found) for found in results] == [[], [], []]


async def test_one_lane_is_settled_without_the_other(queue: RedisQueue, redis: Redis) -> None:
    first = await queue.append(chat(1))
    await hand_out(redis, Priority.INTERACTIVE)
    await queue.append(job(2))
    await hand_out(redis, Priority.BATCH)
    found = [
        ids(await queue.claim(MODEL, "w1", max_jobs=2, max_batch_jobs=0, block_s=0))
        for _ in range(2)
    ]
    assert found == [[first], []]
    before = await scripts(redis)
    assert not await queue.claim(MODEL, "w1", max_jobs=2, max_batch_jobs=0, block_s=0)
    assert await scripts(redis) == before, "nothing is in doubt of what it may have"
    (late,) = await claim(queue, "w1")
    assert (late.job, late.deliveries) == (job(2), 2)
