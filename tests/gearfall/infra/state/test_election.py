"""Leader election: one leader at a time, and one that is deposed learns of it."""

import asyncio

import pytest

from gearfall.core.errors import Conflict, Unavailable
from gearfall.core.records import SchedulerRecord
from gearfall.infra.state.cluster_keys import LEADER_KEY, decode_entry
from gearfall.infra.state.election import campaign, resign, wait_deposed
from gearfall.infra.state.memory_state import MemoryState, MemoryStateServer

A = SchedulerRecord("a", "127.0.0.1:1")
B = SchedulerRecord("b", "127.0.0.1:2")


async def leader(state: MemoryState) -> SchedulerRecord | None:
    entry = await state.get(LEADER_KEY)
    return decode_entry(entry.key, entry.value)[2] if entry else None  # type: ignore[return-value]


async def test_the_first_wins_and_the_second_follows_when_it_resigns():
    server = MemoryStateServer()
    first, second = MemoryState(server), MemoryState(server)
    lease_a, lease_b = await first.grant_lease(10), await second.grant_lease(10)
    fence_a = await campaign(first, A, lease_a)
    await first.put("x", b"a", fence=fence_a)

    waiting = asyncio.create_task(campaign(second, B, lease_b))
    deposed = asyncio.create_task(wait_deposed(first, fence_a, lease_a))
    await second.put("turn", b"")
    assert not waiting.done()
    assert await leader(second) == A

    await resign(lease_a)
    fence_b = await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(deposed, 10)
    assert await leader(first) == B
    assert fence_b.create_revision > fence_a.create_revision
    with pytest.raises(Conflict):
        await first.put("x", b"late", fence=fence_a)
    await second.put("x", b"b", fence=fence_b)


async def test_of_many_candidates_one_leads():
    server = MemoryStateServer()
    states = [MemoryState(server) for _ in range(8)]
    leases = [await state.grant_lease(10) for state in states]
    tasks = [
        asyncio.create_task(campaign(state, SchedulerRecord(str(n), "x"), lease))
        for n, (state, lease) in enumerate(zip(states, leases, strict=True))
    ]
    order = []
    for _ in states:
        async with asyncio.timeout(10):
            done, _ = await asyncio.wait(
                [task for n, task in enumerate(tasks) if n not in order],
                return_when=asyncio.FIRST_COMPLETED,
            )
        assert len(done) == 1
        winner = tasks.index(done.pop())
        record = await leader(states[0])
        assert record is not None
        assert record.scheduler_id == str(winner)
        order.append(winner)
        await resign(leases[winner])
    assert sorted(order) == list(range(8))


async def test_a_candidate_whose_lease_is_lost_gives_up():
    server = MemoryStateServer()
    state = MemoryState(server)
    await campaign(state, A, await state.grant_lease(10))
    lease = await state.grant_lease(10)
    waiting = asyncio.create_task(campaign(state, B, lease))
    await state.put("turn", b"")
    lease.expire()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(waiting, 10)


async def test_a_leader_whose_lease_is_lost_is_deposed():
    state = MemoryState()
    lease = await state.grant_lease(10)
    fence = await campaign(state, A, lease)
    deposed = asyncio.create_task(wait_deposed(MemoryState(state.server), fence, lease))
    lease.expire()
    await asyncio.wait_for(deposed, 10)


async def test_a_leader_whose_key_was_deleted_is_deposed():
    state = MemoryState()
    lease = await state.grant_lease(10)
    fence = await campaign(state, A, lease)
    deposed = asyncio.create_task(wait_deposed(state, fence, lease))
    await state.delete(LEADER_KEY)
    await asyncio.wait_for(deposed, 10)


async def test_an_election_goes_on_after_cluster_state_was_away():
    server = MemoryStateServer()
    state = MemoryState(server)
    lease = await state.grant_lease(10)
    server.stop()
    waiting = asyncio.create_task(campaign(state, A, lease))
    await asyncio.sleep(0)
    assert not waiting.done()
    server.start()
    await asyncio.wait_for(waiting, 10)
    assert await leader(state) == A


async def test_a_write_whose_answer_was_lost_still_wins():
    class Forgetful(MemoryState):
        async def compare_and_set(self, *args, **kwargs):
            await super().compare_and_set(*args, **kwargs)
            raise Unavailable("the answer was lost")

    state = Forgetful()
    lease = await state.grant_lease(10)
    fence = await asyncio.wait_for(campaign(state, A, lease), 10)
    assert await leader(state) == A
    await state.put("x", b"", fence=fence)
