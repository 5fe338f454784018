"""Replicas that share one queue: shares are kept, nobody waits for who is not there.

Time is virtual: what takes a second here takes none.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from gearfall.core.gears.claim_rule import ClaimRule
from gearfall.infra.queue.memory_queue import MemoryQueue, MemoryQueueServer
from services.worker.jobs.turns import GRACE_S, Turns
from tests.services.router.virtual_time import run_virtually
from tests.services.worker.fakes import MODEL, job

BLOCK_S = 0.5


@dataclass
class Replica:
    """Claims as a claim loop does; each job takes a slot for `service_s`."""

    name: str
    server: MemoryQueueServer
    rule: Callable[[], ClaimRule]
    slots: int = 4
    service_s: float = 0.05
    running: int = 0
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    taken: list[tuple[float, int]] = field(default_factory=list)
    """When, and how many at once."""

    async def run(self) -> None:
        queue = MemoryQueue(self.server)
        turns = Turns(MODEL, queue, self.rule, BLOCK_S)
        loop = asyncio.get_running_loop()
        while True:
            if self.running >= self.slots:
                self.freed.clear()
                await self.freed.wait()
                continue
            room = self.slots - self.running
            turn = await turns.next(room, is_idle=self.running == 0, pause=asyncio.sleep)
            if turn is None:
                continue
            jobs = await queue.claim(MODEL, self.name, max_jobs=turn.max_jobs, block_s=turn.block_s)
            turns.note_taken(len(jobs))
            if not jobs:
                continue
            self.taken.append((loop.time(), len(jobs)))
            self.running += len(jobs)
            for each in jobs:
                loop.call_later(self.service_s, self._finish, queue, each.entry_id)

    def _finish(self, queue: MemoryQueue, entry_id: str) -> None:
        self.running -= 1
        self.freed.set()
        self.server.queues[MODEL].pop(entry_id)

    @property
    def jobs(self) -> int:
        return sum(count for _, count in self.taken)


_names = itertools.count()


def send(server: MemoryQueueServer, count: int = 1) -> None:
    for _ in range(count):
        server.append(MODEL, job(f"job-{next(_names)}"))


async def play(
    replicas: list[Replica], server: MemoryQueueServer, rate: float, jobs: int, *, burst: int = 1
) -> None:
    """Send jobs at random times and return when none waits."""
    draw, tasks = Random(3), [asyncio.create_task(each.run()) for each in replicas]
    for _ in range(jobs // burst):
        await asyncio.sleep(burst * draw.expovariate(rate))
        send(server, burst)
    await asyncio.sleep(2.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def shared(share: float | None) -> Callable[[], ClaimRule]:
    return lambda: ClaimRule(share)


@pytest.mark.parametrize("rate", [5.0, 40.0, 100.0])
@pytest.mark.parametrize("burst", [1, 8])
@pytest.mark.parametrize("shares", [(0.75, 0.25), (0.5, 0.5), (0.6, 0.3, 0.1)])
def test_jobs_are_spread_by_the_shares(shares, burst, rate):
    """Below what the smallest share's replica can do of it; 80 jobs a second each."""
    server, jobs = MemoryQueueServer(), 800

    async def main() -> None:
        replicas = [
            Replica(f"w{number}", server, shared(share), slots=16)
            for number, share in enumerate(shares)
        ]
        await play(replicas, server, rate, jobs, burst=burst)
        assert sum(each.jobs for each in replicas) == jobs
        for replica, share in zip(replicas, shares, strict=True):
            assert abs(replica.jobs / jobs - share) < 0.03

    run_virtually(main())


def test_without_shares_jobs_go_to_whoever_asks_first():
    server = MemoryQueueServer()

    async def main() -> None:
        replicas = [Replica(name, server, ClaimRule) for name in ("a", "b")]
        await play(replicas, server, 40.0, 100)
        assert sum(each.jobs for each in replicas) == 100

    run_virtually(main())


def test_what_one_has_no_room_for_the_other_takes_in_no_time():
    """Its share is 0.9 of 100 jobs a second, and it has two slots for 20 each."""
    server = MemoryQueueServer()

    async def main() -> None:
        small = Replica("small", server, shared(0.9), slots=2)
        large = Replica("large", server, shared(0.1), slots=64)
        await play([small, large], server, 100.0, 400)
        assert small.jobs + large.jobs == 400
        assert large.jobs > 200

    run_virtually(main())


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_replica_that_died_with_the_larger_share_strands_nothing(share):
    """Nobody has told the other yet: each job waits for the grace and no longer."""
    server = MemoryQueueServer()

    async def main() -> None:
        left = Replica("left", server, shared(share), slots=64)
        loop, waited = asyncio.get_running_loop(), []
        task = asyncio.create_task(left.run())
        for _ in range(50):
            await asyncio.sleep(0.1)
            before, sent_s = left.jobs, loop.time()
            send(server)
            await asyncio.sleep(0.05)
            assert left.jobs == before + 1
            waited.append(left.taken[-1][0] - sent_s)
        assert max(waited) <= GRACE_S + 1e-9
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(main())


def test_shares_that_change_are_followed():
    server, share = MemoryQueueServer(), {"a": 0.9, "b": 0.1}

    async def main() -> None:
        a = Replica("a", server, lambda: ClaimRule(share["a"]), slots=16)
        b = Replica("b", server, lambda: ClaimRule(share["b"]), slots=16)
        await play([a, b], server, 40.0, 400)
        before = Counter(a=a.jobs, b=b.jobs)
        share.update(a=0.1, b=0.9)
        await play([a, b], server, 40.0, 400)
        assert abs(before["a"] / 400 - 0.9) < 0.03
        assert abs((a.jobs - before["a"]) / 400 - 0.1) < 0.03

    run_virtually(main())


def held(trigger: int, most_wait_s: float, share: float | None = None) -> Callable[[], ClaimRule]:
    return lambda: ClaimRule(share, trigger, most_wait_s)


@pytest.mark.parametrize("share", [None, 1.0])
def test_an_idle_engine_begins_when_the_batch_is_full(share):
    server = MemoryQueueServer()

    async def main() -> None:
        replica = Replica("a", server, held(4, 0.05, share), slots=8)
        task = asyncio.create_task(replica.run())
        for _ in range(4):
            await asyncio.sleep(0.01)
            send(server)
        full_s = asyncio.get_running_loop().time()
        await asyncio.sleep(0.5)
        ((taken_s, count),) = replica.taken
        assert taken_s == pytest.approx(full_s)
        assert count == 4
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(main())


def test_a_lone_job_waits_for_the_bound_and_no_longer():
    server = MemoryQueueServer()

    async def main() -> None:
        replica = Replica("a", server, held(4, 0.05))
        task = asyncio.create_task(replica.run())
        await asyncio.sleep(0.7)
        send(server)
        sent_s = asyncio.get_running_loop().time()
        await asyncio.sleep(1.0)
        ((taken_s, count),) = replica.taken
        assert taken_s == pytest.approx(sent_s + 0.05)
        assert count == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(main())


def test_while_the_engine_works_a_job_joins_at_once():
    server = MemoryQueueServer()

    async def main() -> None:
        replica = Replica("a", server, held(2, 0.05), service_s=1.0)
        task = asyncio.create_task(replica.run())
        await asyncio.sleep(0.1)
        send(server, 2)
        await asyncio.sleep(0.2)
        send(server)
        sent_s = asyncio.get_running_loop().time()
        await asyncio.sleep(0.2)
        assert [count for _, count in replica.taken] == [2, 1]
        assert replica.taken[1][0] == pytest.approx(sent_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(main())


@pytest.mark.parametrize("share", [None, 1.0])
def test_an_engine_that_became_idle_waits_for_the_next_batch(share):
    """No claim from the time when it worked may be left blocking on the queue."""
    server = MemoryQueueServer()

    async def main() -> None:
        replica = Replica("a", server, held(2, 0.05, share), service_s=0.1)
        task = asyncio.create_task(replica.run())
        await asyncio.sleep(0.1)
        send(server, 2)
        await asyncio.sleep(0.2)
        send(server)
        sent_s = asyncio.get_running_loop().time()
        await asyncio.sleep(0.2)
        assert [count for _, count in replica.taken] == [2, 1]
        assert replica.taken[1][0] == pytest.approx(sent_s + 0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(main())


def test_a_job_that_waits_for_others_is_nobodys_and_can_be_cancelled():
    server = MemoryQueueServer()

    async def main() -> None:
        replica = Replica("a", server, held(4, 0.05))
        task = asyncio.create_task(replica.run())
        await asyncio.sleep(0.1)
        entry_id = server.append(MODEL, job("gone"))
        await asyncio.sleep(0.02)
        assert await MemoryQueue(server).cancel(MODEL, entry_id)
        await asyncio.sleep(1.0)
        assert replica.taken == []
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(main())
