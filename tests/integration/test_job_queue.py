"""The contract of the JobQueue port, kept by the fake and by Redis Streams."""

import asyncio

import pytest

from gearfall.core.ids import ModelName
from gearfall.core.ports import QueueDepth
from tests.integration.queue_jobs import MODEL, append, chat, claim, ids, job


async def test_jobs_come_whole_and_in_order(queues):
    queue = queues.connect()
    entries = await append(queue, 5)
    claimed = [*await claim(queue, "w1", max_jobs=2), *await claim(queue, "w1")]
    assert [entry.job for entry in claimed] == [job(number) for number in range(5)]
    assert ids(claimed) == entries
    assert {entry.deliveries for entry in claimed} == {1}


async def test_interactive_jobs_pass_batch_jobs_and_each_class_keeps_its_order(queues):
    queue = queues.connect()
    jobs = [job(0), chat(1), job(2), chat(3), job(4)]
    names = [await queue.append(each) for each in jobs]
    assert len(set(names)) == len(names)
    first = await claim(queue, "w1", max_jobs=3)
    assert [entry.job for entry in first] == [jobs[1], jobs[3], jobs[0]]
    assert ids(first) == [names[1], names[3], names[0]]
    assert await queue.depth(MODEL) == QueueDepth(waiting=2, claimed=3)
    assert await queue.holder(MODEL, names[0]) == await queue.holder(MODEL, names[1]) == "w1"
    taken_over = await queue.reclaim(MODEL, "w2", alive=frozenset(), max_jobs=2)
    assert ids(taken_over) == [names[1], names[3]]
    await queue.acknowledge(MODEL, [names[0], names[1]])
    held = [await queue.contains(MODEL, name) for name in names]
    assert held == [False, False, True, True, True]
    assert await queue.cancel(MODEL, names[2])
    assert ids(await claim(queue, "w1")) == [names[4]]


async def test_a_claim_takes_no_more_batch_jobs_than_it_asks_for(queues):
    queue = queues.connect()
    names = [await queue.append(each) for each in (job(0), job(1), chat(2), job(3))]

    async def take(max_batch: int, block_s: float = 0.0) -> list[str]:
        return ids(
            await queue.claim(MODEL, "w1", max_jobs=5, block_s=block_s, max_batch_jobs=max_batch)
        )

    assert await take(0) == [names[2]]
    assert await take(0, block_s=0.05) == []
    assert await take(2) == [names[0], names[1]]
    waiting = asyncio.create_task(take(0, block_s=5.0))
    await queue.append(job(4))
    late = await queue.append(chat(5))
    assert await waiting == [late]
    assert len(await take(5)) == 2


async def test_a_claim_that_waits_hears_of_either_class(queues):
    queue = queues.connect()
    for make in (job, chat):
        waiting = asyncio.create_task(claim(queue, "w1", max_jobs=3, block_s=5.0))
        name = await queue.append(make(1))
        assert ids(await waiting) == [name]


async def test_a_look_ahead_shows_what_the_next_claim_gets_and_takes_nothing(queues):
    queue = queues.connect()
    assert await queue.peek(MODEL, max_jobs=9) == []
    for each in (job(0), chat(1), job(2), chat(3)):
        await queue.append(each)
    assert await queue.peek(MODEL, max_jobs=3) == [chat(1), chat(3), job(0)]
    (taken,) = await claim(queue, "w1", max_jobs=1)
    assert taken.job == chat(1)
    assert await queue.peek(MODEL, max_jobs=9) == [chat(3), job(0), job(2)]
    assert await queue.depth(MODEL) == QueueDepth(waiting=3, claimed=1)
    await claim(queue, "w2")
    assert await queue.peek(MODEL, max_jobs=9) == []


async def test_arrivals_are_counted_whatever_becomes_of_them(queues):
    queue = queues.connect()
    before = await queue.arrivals(MODEL)
    assert (before.appended, before.waiting) == (0, 0)
    names = [await queue.append(each) for each in (job(0), chat(1), job(2))]
    (taken,) = await claim(queue, "w1", max_jobs=1)
    await queue.acknowledge(MODEL, [taken.entry_id])
    await queue.cancel(MODEL, names[2])
    after = await queue.arrivals(MODEL)
    assert (after.appended, after.waiting) == (3, 1)
    assert after.newest != before.newest


@pytest.mark.parametrize("make", [job, chat])
async def test_who_waits_for_an_arrival_hears_of_it_and_takes_nothing(queues, make):
    queue = queues.connect()
    await append(queue, 1)
    since = await queue.arrivals(MODEL)
    waits = [
        asyncio.create_task(queues.connect().wait_arrival(MODEL, since, block_s=20))
        for _ in range(2)
    ]
    await asyncio.sleep(0)
    await queue.append(make(1))
    assert await asyncio.gather(*waits) == [True, True]
    assert await queue.wait_arrival(MODEL, since, block_s=0.01), "what came meanwhile counts"
    now = await queue.arrivals(MODEL)
    assert not await queue.wait_arrival(MODEL, now, block_s=0.01)
    assert len(await claim(queue, "w1")) == 2


async def test_a_look_ahead_passes_a_malformed_entry(queues):
    queue = queues.connect()
    await queues.append_malformed(MODEL)
    await append(queue, 1)
    assert await queue.peek(MODEL, max_jobs=9) == [job(0)]


async def test_an_entry_goes_to_one_consumer_only(queues):
    clients = [queues.connect() for _ in range(4)]
    await append(clients[0], 40)
    claims = (claim(clients[n % 4], f"w{n}", max_jobs=3) for n in range(20))
    taken = [entry for entries in await asyncio.gather(*claims) for entry in entries]
    assert sorted(entry.job.job_id for entry in taken) == sorted(f"job-{n}" for n in range(40))


async def test_a_claim_waits_for_the_first_job(queues):
    queue = queues.connect()
    waiting = asyncio.create_task(claim(queue, "w1", block_s=20))
    await queue.append(job(1, ModelName("other")))
    entry_id = await queues.connect().append(job(0))
    assert ids(await asyncio.wait_for(waiting, 10)) == [entry_id]


async def test_a_claim_of_an_empty_queue_ends_empty(queues):
    queue = queues.connect()
    assert list(await claim(queue, "w1")) == []
    assert list(await claim(queue, "w1", block_s=0.05)) == []


async def test_a_blocked_claim_delays_nobody(queues):
    queue = queues.connect()
    blocked = [asyncio.create_task(claim(queue, f"w{n}", block_s=30)) for n in range(20)]
    await asyncio.sleep(0)
    other = ModelName("other")
    async with asyncio.timeout(10):
        entry_id = await queue.append(job(1, other))
        got = await queue.claim(other, "w1", max_jobs=1, block_s=0)
        await queue.acknowledge(other, ids(got))
    assert ids(got) == [entry_id]
    for task in blocked:
        task.cancel()
    await asyncio.gather(*blocked, return_exceptions=True)


async def test_depth_and_contains_follow_an_entry_through_its_life(queues):
    queue = queues.connect()
    assert await queue.depth(MODEL) == QueueDepth(waiting=0, claimed=0)
    first, second = await append(queue, 2)
    assert await queue.depth(MODEL) == QueueDepth(waiting=2, claimed=0)
    await claim(queue, "w1", max_jobs=1)
    assert await queue.depth(MODEL) == QueueDepth(waiting=1, claimed=1)
    assert await queue.contains(MODEL, first)
    assert await queue.contains(MODEL, second)
    await queue.acknowledge(MODEL, [first])
    await queue.acknowledge(MODEL, [first])
    await queue.acknowledge(MODEL, [])
    assert await queue.depth(MODEL) == QueueDepth(waiting=1, claimed=0)
    assert not await queue.contains(MODEL, first)
    assert list(await claim(queue, "w1")) != []
    assert list(await claim(queue, "w1")) == []


async def test_entries_of_the_dead_are_redelivered_and_those_of_the_living_are_not(queues):
    queue = queues.connect()
    dead, living, own = await append(queue, 3)
    for consumer in ("dead", "living", "me"):
        await claim(queue, consumer, max_jobs=1)
    alive = frozenset({"living", "me"})
    taken = await queue.reclaim(MODEL, "me", alive=alive, max_jobs=10)
    assert [(entry.entry_id, entry.job, entry.deliveries) for entry in taken] == [(dead, job(0), 2)]
    assert list(await queue.reclaim(MODEL, "me", alive=alive, max_jobs=10)) == []
    again = await queue.reclaim(MODEL, "next", alive=frozenset({"next"}), max_jobs=10)
    assert {entry.entry_id: entry.deliveries for entry in again} == {dead: 3, living: 2, own: 2}


async def test_of_many_reclaimers_one_gets_each_entry(queues):
    clients = [queues.connect() for _ in range(4)]
    entries = await append(clients[0], 30)
    await claim(clients[0], "dead")
    alive = frozenset(f"w{n}" for n in range(8))
    claims = (clients[n % 4].reclaim(MODEL, f"w{n}", alive=alive, max_jobs=7) for n in range(8))
    taken = [entry for got in await asyncio.gather(*claims) for entry in got]
    assert sorted(ids(taken)) == sorted(entries)


async def test_reclaim_of_an_unknown_queue_is_empty(queues):
    queue = queues.connect()
    assert list(await queue.reclaim(MODEL, "me", alive=frozenset(), max_jobs=9)) == []


async def test_appends_at_once_are_all_kept_and_one_that_is_cancelled_hurts_none(queues):
    queue = queues.connect()
    tasks = [asyncio.create_task(queue.append(job(i))) for i in range(300)]
    await asyncio.sleep(0)
    tasks[7].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    kept = [each for each in results if isinstance(each, str)]
    assert len(kept) == len(set(kept)) >= 299
    taken = await claim(queue, "w1", max_jobs=300)
    assert set(kept) <= set(ids(taken))
    await queue.acknowledge(MODEL, ids(taken))
    assert await queue.depth(MODEL) == QueueDepth(waiting=0, claimed=0)


async def test_the_holder_of_an_entry_is_who_claimed_it_last(queues):
    queue = queues.connect()
    assert await queue.holder(MODEL, "1-0") is None
    (entry_id,) = await append(queue, 1)
    assert await queue.holder(MODEL, entry_id) is None
    await claim(queue, "w1")
    assert await queue.holder(MODEL, entry_id) == "w1"
    await queue.reclaim(MODEL, "w2", alive=frozenset({"w2"}), max_jobs=1)
    assert await queue.holder(MODEL, entry_id) == "w2"
    await queue.acknowledge(MODEL, [entry_id])
    assert await queue.holder(MODEL, entry_id) is None


async def test_cancel_removes_what_nobody_claimed(queues):
    queue = queues.connect()
    first, second = await append(queue, 2)
    assert await queue.cancel(MODEL, first) is True
    assert await queue.cancel(MODEL, first) is False
    assert ids(await claim(queue, "w1")) == [second]
    assert await queue.cancel(MODEL, second) is False
    assert await queue.contains(MODEL, second)


async def test_an_entry_is_either_cancelled_or_claimed(queues):
    worker, router = queues.connect(), queues.connect()
    entries = await append(router, 60)
    claims = [claim(worker, "w1", max_jobs=2) for _ in range(15)]
    cancels = [router.cancel(MODEL, entry_id) for entry_id in reversed(entries)]
    results = await asyncio.gather(
        *(x for pair in zip(claims, cancels, strict=False) for x in pair)
    )
    claimed = {entry_id for got in results[::2] for entry_id in ids(got)}
    for cancel in cancels[len(claims) :]:
        cancel.close()
    cancelled = {
        entry_id
        for entry_id, is_cancelled in zip(reversed(entries), results[1::2], strict=False)
        if is_cancelled
    }
    assert not claimed & cancelled
    rest = set(ids(await claim(worker, "w1")))
    assert claimed | cancelled | rest == set(entries)


async def test_a_malformed_entry_is_dropped_and_blocks_nothing(queues, caplog):
    queue = queues.connect()
    first = await queue.append(job(0))
    bad = await queues.append_malformed(MODEL)
    last = await queue.append(job(1))
    assert ids(await claim(queue, "w1")) == [first, last]
    assert not await queue.contains(MODEL, bad)
    assert await queue.depth(MODEL) == QueueDepth(waiting=0, claimed=2)
    assert "malformed" in caplog.text


async def test_drop_removes_a_queue_and_it_can_be_used_again(queues):
    queue = queues.connect()
    await append(queue, 3)
    await claim(queue, "w1", max_jobs=1)
    await queue.drop(MODEL)
    await queue.drop(MODEL)
    assert await queue.depth(MODEL) == QueueDepth(waiting=0, claimed=0)
    entry_id = await queue.append(job(7))
    assert ids(await claim(queue, "w1", block_s=5)) == [entry_id]
