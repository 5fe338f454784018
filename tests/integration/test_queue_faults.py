"""The JobQueue port where calls break off and the server dies or forgets: fake and Redis alike."""

import asyncio
import contextlib

import pytest

from gearfall.core.errors import Overloaded, Unavailable
from gearfall.core.ids import ModelName
from gearfall.core.ports import JobQueue, QueueDepth
from tests.integration.queue_jobs import MODEL, append, chat, claim, ids, job


async def append_when_reachable(queue: JobQueue, number: int) -> str:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(Unavailable):
                return await queue.append(job(number))


async def test_the_queue_heals_after_all_data_was_lost(queues):
    queue = queues.connect()
    (lost,) = await append(queue, 1)
    await claim(queue, "w1")
    await queues.flush()
    assert not await queue.contains(MODEL, lost)
    assert await queue.cancel(MODEL, lost) is False
    await queue.acknowledge(MODEL, [lost])
    assert list(await queue.reclaim(MODEL, "w2", alive=frozenset(), max_jobs=9)) == []
    entry_id = await queue.append(job(1))
    assert ids(await claim(queue, "w1", block_s=5)) == [entry_id]


async def test_a_blocked_claim_survives_the_loss_of_all_data(queues):
    queue = queues.connect()
    await queue.acknowledge(MODEL, await append(queue, 1))
    waiting = asyncio.create_task(claim(queue, "w1", block_s=20))
    await asyncio.sleep(0)
    await queue.depth(MODEL)
    await queues.flush()
    entry_id = await queue.append(job(1))
    assert ids(await asyncio.wait_for(waiting, 10)) == [entry_id]


@contextlib.asynccontextmanager
async def full(queues):
    await queues.set_full(True)
    try:
        yield
    finally:
        await queues.set_full(False)


@pytest.mark.parametrize("make", [job, chat])
async def test_a_full_server_hands_out_what_it_has_to_whoever_comes_first(queues, make):
    queue = queues.connect()
    entry_id = await queue.append(make(0))
    async with full(queues):
        with pytest.raises(Overloaded):
            await queue.append(make(1))
        (taken,) = await claim(queue, "w1")
        assert (taken.entry_id, taken.job) == (entry_id, make(0))
        assert list(await claim(queue, "w1", block_s=0.01)) == []
        await queue.acknowledge(MODEL, [entry_id])
        assert await queue.depth(MODEL) == QueueDepth(waiting=0, claimed=0)
    assert await queue.append(make(1)) in ids(await claim(queue, "w2"))


async def test_a_claim_of_one_class_readies_the_queue_for_both(queues):
    queue = queues.connect()
    assert list(await queue.claim(MODEL, "w1", max_jobs=1, block_s=0, max_batch_jobs=0)) == []
    entry_id = await queue.append(chat(0))
    async with full(queues):
        assert ids(await claim(queue, "w1")) == [entry_id]


async def test_the_first_appends_at_once_are_kept_in_order_with_those_of_other_queues(queues):
    queue = queues.connect()
    jobs = [job(n, ModelName("other") if n % 2 else MODEL) for n in range(20)]
    names = await asyncio.gather(*(queue.append(each) for each in jobs))
    assert ids(await claim(queue, "w1")) == names[::2]


async def test_a_restarted_server_is_used_again_and_keeps_its_entries(queues):
    queue = queues.connect()
    await append(queue, 2)
    claimed = await claim(queue, "w1", max_jobs=1)
    waiting = asyncio.create_task(queue.claim(ModelName("o"), "w1", max_jobs=1, block_s=30))
    await queue.depth(MODEL)
    queues.stop()
    try:
        calls = (
            queue.append(job(5)),
            claim(queue, "w1", block_s=1),
            queue.acknowledge(MODEL, ["1-0"]),
            queue.reclaim(MODEL, "w1", alive=frozenset(), max_jobs=1),
            queue.cancel(MODEL, "1-0"),
            queue.contains(MODEL, "1-0"),
            queue.depth(MODEL),
            queue.drop(MODEL),
            waiting,
        )
        results = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        queues.start()
    assert [type(result) for result in results] == [Unavailable] * len(calls)
    await append_when_reachable(queue, 2)
    assert await queue.contains(MODEL, claimed[0].entry_id)
    assert [entry.job for entry in await claim(queue, "w1")] == [job(1), job(2)]


async def test_what_an_interrupted_claim_took_is_handed_out_by_the_next(queues):
    queue = queues.connect()
    held = await append(queue, 1)
    assert ids(await claim(queue, "w1")) == held
    appended = []
    for number in range(20):
        waiting = asyncio.create_task(claim(queue, "w1", block_s=20))
        await queue.depth(MODEL)
        appending = asyncio.create_task(queue.append(job(number)))
        for _ in range(number % 7):
            await asyncio.sleep(0)
        waiting.cancel()
        (got,) = await asyncio.gather(waiting, return_exceptions=True)
        appended.append(await appending)
        if not isinstance(got, BaseException):
            await queue.acknowledge(MODEL, ids(got))
    seen: list[str] = []
    while (await queue.depth(MODEL)).waiting or (await queue.depth(MODEL)).claimed > len(held):
        got = await claim(queue, "w1", max_jobs=3, block_s=0.05)
        seen += ids(got)
        await queue.acknowledge(MODEL, ids(got))
    assert not set(seen) & set(held)
    assert set(seen) <= set(appended)
    assert len(seen) == len(set(seen))


async def test_a_closed_client_refuses_calls(queues):
    queue = queues.connect()
    waiting = asyncio.create_task(claim(queue, "w1", block_s=20))
    await queue.depth(MODEL)
    await queue.close()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(waiting, 10)
    with pytest.raises(Unavailable):
        await queue.append(job(1))


async def test_a_call_that_closing_breaks_off_is_not_tried_again(queues):
    queue = queues.connect()
    since = await queue.arrivals(MODEL)
    waiting = asyncio.create_task(queue.wait_arrival(MODEL, since, block_s=20))
    await queue.depth(MODEL)
    await queue.close()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(waiting, 10)


async def restart(queues, queue: JobQueue) -> None:
    """Return when the server is back with what it kept, and the client has noticed."""
    assert queue.restarts == 0
    queues.stop()
    queues.start()
    await queue.depth(MODEL)
    assert queue.restarts == 1


async def take_over(queue: JobQueue, consumer: str, *alive: str) -> list[str]:
    living = frozenset({consumer, *alive})
    return ids(await queue.reclaim(MODEL, consumer, alive=living, max_jobs=9))


@pytest.mark.parametrize("take", [claim, take_over])
async def test_an_entry_whose_acknowledgement_was_forgotten_comes_again(queues, take):
    queue = queues.connect()
    done, running = await append(queue, 2)
    assert ids(await claim(queue, "w1")) == [done, running]
    await queues.forget_from_now()
    await queue.acknowledge(MODEL, [done])
    assert await queue.depth(MODEL) == QueueDepth(waiting=0, claimed=1)
    await restart(queues, queue)
    assert await queue.depth(MODEL) == QueueDepth(waiting=0, claimed=2)
    again = await take(queue, "w1")
    assert [getattr(entry, "entry_id", entry) for entry in again] == [done]
    assert list(await claim(queue, "w1")) == []
    await queue.acknowledge(MODEL, [done, running])
    assert await queue.depth(MODEL) == QueueDepth(waiting=0, claimed=0)


async def test_an_entry_that_was_taken_over_from_the_dead_and_done_comes_again(queues):
    queue = queues.connect()
    (done,) = await append(queue, 1)
    assert ids(await claim(queue, "dead")) == [done]
    await queues.forget_from_now()
    assert await take_over(queue, "w1") == [done]
    await queue.acknowledge(MODEL, [done])
    await restart(queues, queue)
    assert await queue.holder(MODEL, done) == "dead"
    assert await take_over(queue, "w1") == [done]


async def test_an_entry_whose_claim_was_forgotten_is_handed_out_again(queues):
    queue = queues.connect()
    (entry_id,) = await append(queue, 1)
    await queues.forget_from_now()
    assert ids(await claim(queue, "w1")) == [entry_id]
    await restart(queues, queue)
    assert ids(await claim(queue, "w2")) == [entry_id]


async def test_a_server_that_kept_all_hands_nothing_out_twice(queues):
    queue = queues.connect()
    await append(queue, 2)
    assert len(await claim(queue, "w1", max_jobs=1)) == 1
    await restart(queues, queue)
    assert await take_over(queue, "w1") == []
    (second,) = await claim(queue, "w1")
    assert (second.job, second.deliveries) == (job(1), 1)
