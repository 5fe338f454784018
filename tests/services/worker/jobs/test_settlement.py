import asyncio

import pytest

from gearfall.infra.queue.memory_queue import MemoryQueue
from services.worker.jobs.settlement import Settlement
from tests.services.worker.fakes import MODEL, WORKER, Watched, job


class CountingQueue(MemoryQueue):
    """Counts how often it is asked to acknowledge."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 0
        self.watched = Watched()

    async def acknowledge(self, model, entry_ids) -> None:
        self.attempts += 1
        self.watched.notify()
        await super().acknowledge(model, entry_ids)


@pytest.fixture
async def queue():
    return CountingQueue()


async def claimed(queue, *names):
    for name in names:
        await queue.append(job(name, address="r:1"))
    return [q.entry_id for q in await queue.claim(MODEL, WORKER, max_jobs=9, block_s=0)]


async def test_entries_are_acknowledged_in_the_background(queue):
    entry_ids = await claimed(queue, "a", "b")
    settlement = Settlement(queue)
    settlement.start()
    for entry_id in entry_ids:
        settlement.acknowledge(MODEL, [entry_id])
    async with asyncio.timeout(5):
        await settlement.wait_empty()
    assert (await queue.depth(MODEL)).claimed == 0
    await settlement.stop()


async def test_an_outage_is_waited_out_and_nothing_is_forgotten(queue):
    entry_ids = await claimed(queue, "a", "b")
    settlement = Settlement(queue, retry_s=0.001)
    queue.server.stop()
    settlement.start()
    settlement.acknowledge(MODEL, entry_ids[:1])
    await queue.watched.until(lambda: queue.attempts >= 2)
    settlement.acknowledge(MODEL, entry_ids[1:])
    queue.server.start()
    async with asyncio.timeout(5):
        await settlement.wait_empty()
    assert (await queue.depth(MODEL)).claimed == 0
    await settlement.stop()


async def test_stop_gives_up_on_a_queue_that_stays_away(queue):
    entry_ids = await claimed(queue, "a")
    settlement = Settlement(queue, retry_s=0.001)
    queue.server.stop()
    settlement.start()
    settlement.acknowledge(MODEL, entry_ids)
    await settlement.stop(timeout_s=0.01)
    queue.server.start()
    assert (await queue.depth(MODEL)).claimed == 1
