"""Containers are killed, frozen and cut off: every accepted answer is whole, and all heals."""

import asyncio
from collections.abc import Callable

import pytest

from tests.compose.compose_cluster import SLOTS, Containers
from tests.compose.models import WANDERER
from tests.compose.struck_cluster import STRIKE_AT, StruckCluster, ready_on

NODES = {"worker-1": "store-1", "worker-2": "store-2"}


async def test_an_answer_goes_on_when_its_worker_crashes(struck: StruckCluster) -> None:
    crashed: list[tuple[str, int]] = []

    async def crash() -> None:
        worker = await struck.owner()
        crashed.append((worker, struck.containers.restarts(worker)))
        await asyncio.to_thread(struck.containers.crash, worker)

    got = await struck.check_same(crash)
    assert got.owners == 2
    ((worker, restarts),) = crashed
    await asyncio.to_thread(struck.containers.wait_healthy, worker)
    assert struck.containers.restarts(worker) == restarts + 1
    await struck.until(struck.status, lambda status: worker in ready_on(status, WANDERER))


async def test_an_answer_goes_on_when_its_worker_freezes(struck: StruckCluster) -> None:
    frozen: list[str] = []

    async def freeze() -> None:
        frozen.append(await struck.owner())
        await asyncio.to_thread(struck.containers.pause, frozen[0])

    try:
        got = await struck.check_same(freeze)
    finally:
        for worker in frozen:
            await asyncio.to_thread(struck.containers.unpause, worker)
    assert got.owners == 2
    await struck.until(struck.status, lambda status: len(ready_on(status, WANDERER)) == 2)


async def test_a_worker_that_is_stopped_hands_its_answers_on(struck: StruckCluster) -> None:
    stopped: dict[str, int] = {}

    async def stop() -> None:
        worker = await struck.owner()
        stopped[worker] = await asyncio.to_thread(struck.containers.stop, worker)

    await struck.check_same(stop)
    assert list(stopped.values()) == [0]
    for worker in stopped:
        await asyncio.to_thread(struck.containers.start, worker)


async def test_an_answer_needs_no_store(struck: StruckCluster) -> None:
    struck_store: list[str] = []

    async def crash() -> None:
        struck_store.append(NODES[await struck.owner()])
        await asyncio.to_thread(struck.containers.crash, struck_store[0])

    got = await struck.check_same(crash)
    assert got.owners == 1
    await asyncio.to_thread(struck.containers.wait_healthy, struck_store[0])
    assert await struck.answer_cold("after-the-store") == "5"


@pytest.mark.parametrize("strike", [Containers.kill, Containers.pause], ids=["kill", "pause"])
async def test_the_other_scheduler_takes_over(
    struck: StruckCluster, strike: Callable[[Containers, str], None]
) -> None:
    containers = struck.containers
    leader = await struck.leader()
    before = (await struck.status()).leader

    async def end_leader() -> None:
        await asyncio.to_thread(strike, containers, leader)

    try:
        got = await struck.check_same(end_leader)
        assert got.owners == 1
        assert await struck.answer_cold(f"after-the-{strike.__name__}") == "5"
        after = (await struck.status()).leader
        assert after not in {"", before}
    finally:
        heal = containers.start if strike is Containers.kill else containers.unpause
        await asyncio.to_thread(heal, leader)
    await asyncio.to_thread(containers.wait_healthy, leader)
    # The one that comes back finds that it leads no more.
    assert await struck.answer_cold(f"with-the-{strike.__name__}") == "5"
    assert (await struck.status()).leader == after


async def test_a_frozen_etcd_stops_no_answer(struck: StruckCluster) -> None:
    try:
        got = await struck.check_same(lambda: asyncio.to_thread(struck.containers.pause, "etcd"))
        again = await struck.read()  # a whole new answer while the state is frozen
    finally:
        await asyncio.to_thread(struck.containers.unpause, "etcd")
    assert got.owners == 1
    assert again.token_ids == got.token_ids
    assert await struck.until(lambda: struck.answer_cold("after-the-frost"), bool) == "5"


async def test_a_restarted_etcd_stops_no_answer(struck: StruckCluster) -> None:
    got = await struck.check_same(lambda: asyncio.to_thread(struck.containers.restart, "etcd"))
    assert got.owners == 1
    await asyncio.to_thread(struck.containers.wait_healthy, "etcd")
    assert await struck.until(lambda: struck.answer_cold("after-the-restart"), bool) == "5"


async def test_a_killed_redis_loses_nothing(struck: StruckCluster) -> None:
    restarts = struck.containers.restarts("redis")
    tokens = 2 * STRIKE_AT
    expected = (await struck.reference()).token_ids

    async def crash() -> None:
        await asyncio.to_thread(struck.containers.crash, "redis")

    # More than both workers have room for: some wait in the queue when it goes down.
    others = (struck.read(tokens=tokens) for _ in range(3 * SLOTS))
    answers = await asyncio.gather(struck.read(crash, tokens=tokens), *others)
    assert [answer.token_ids for answer in answers] == [expected[:tokens]] * len(answers)
    await asyncio.to_thread(struck.containers.wait_healthy, "redis")
    assert struck.containers.restarts("redis") == restarts + 1
    assert (await struck.read()).token_ids == expected


async def test_an_answer_goes_on_when_its_node_is_cut_off(struck: StruckCluster) -> None:
    cut: list[str] = []

    async def cut_off() -> None:
        worker = await struck.owner()
        cut.extend((worker, NODES[worker]))
        await asyncio.to_thread(struck.containers.disconnect, *cut)

    try:
        got = await struck.check_same(cut_off)
    finally:
        await asyncio.to_thread(struck.containers.connect, *cut)
    assert got.owners == 2
    await struck.until(struck.status, lambda status: len(ready_on(status, WANDERER)) == 2)
