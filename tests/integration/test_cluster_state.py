"""The contract of the ClusterState port, kept by the fake and by etcd."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gearfall.core.errors import Conflict, Unavailable
from gearfall.core.ports import ClusterState, Fence, KeyDeleted, KeyPut, Snapshot, WatchItem


@contextlib.asynccontextmanager
async def watching(state: ClusterState, prefix: str = "") -> AsyncIterator[Any]:
    """A function that returns the next watch item, within ten seconds."""
    items: Any = state.watch(prefix)
    async with contextlib.aclosing(items):

        async def take() -> WatchItem:
            async with asyncio.timeout(10):
                item: WatchItem = await anext(items)
                return item

        yield take


def seen(item: WatchItem) -> tuple[str, bytes | None]:
    """A change as (key, value), None for a deletion."""
    match item:
        case KeyPut(entry):
            return entry.key, entry.value
        case KeyDeleted(key):
            return key, None
    raise AssertionError(f"{item} is not a change")


def keys(item: WatchItem) -> set[str]:
    assert isinstance(item, Snapshot), item
    return {entry.key for entry in item.entries}


async def put_when_reachable(state: ClusterState, key: str, value: bytes) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(Unavailable):
                await state.put(key, value)
                return


async def test_get_returns_what_was_put(states):
    state = states.connect()
    assert await state.get("a/x") is None
    first = await state.put("a/x", b"1")
    second = await state.put("a/x", b"2")
    entry = await states.connect().get("a/x")
    assert entry is not None
    assert (entry.key, entry.value, entry.lease_id) == ("a/x", b"2", 0)
    assert (entry.create_revision, entry.mod_revision) == (first, second)
    assert first < second


async def test_list_holds_the_prefix_and_nothing_else(states):
    state = states.connect()
    for key in ("a/1", "a/2", "ab", "b/1"):
        await state.put(key, key.encode())
    snapshot = await state.list("a/")
    assert [(entry.key, entry.value) for entry in snapshot.entries] == [
        ("a/1", b"a/1"),
        ("a/2", b"a/2"),
    ]
    assert snapshot.revision >= snapshot.entries[-1].mod_revision
    assert keys(await state.list("")) == {"a/1", "a/2", "ab", "b/1"}


async def test_delete_says_when_it_went_and_whether_it_was_there(states):
    state = states.connect()
    written = await state.put("x", b"")
    deleted = await state.delete("x")
    assert deleted > written
    assert (await state.list("")).revision >= deleted
    assert await state.delete("x") == 0
    assert await state.get("x") is None


async def test_compare_and_set_creates_and_replaces(states):
    state = states.connect()
    revision = await state.compare_and_set("x", b"1", expected_mod_revision=0)
    with pytest.raises(Conflict):
        await state.compare_and_set("x", b"2", expected_mod_revision=0)
    await state.compare_and_set("x", b"3", expected_mod_revision=revision)
    with pytest.raises(Conflict):
        await state.compare_and_set("x", b"4", expected_mod_revision=revision)
    assert (await state.get("x")).value == b"3"


async def test_of_many_creators_one_wins(states):
    clients = [states.connect() for _ in range(4)]

    async def create(number: int) -> bool:
        try:
            state = clients[number % len(clients)]
            await state.compare_and_set("x", str(number).encode(), expected_mod_revision=0)
        except Conflict:
            return False
        return True

    won = await asyncio.gather(*(create(number) for number in range(32)))
    assert sum(won) == 1
    assert (await clients[0].get("x")).value == str(won.index(True)).encode()


async def test_no_increment_is_lost_in_a_race(states):
    state = states.connect()
    await state.put("count", b"0")

    async def increment() -> None:
        while True:
            entry = await state.get("count")
            with contextlib.suppress(Conflict):
                await state.compare_and_set(
                    "count",
                    str(int(entry.value) + 1).encode(),
                    expected_mod_revision=entry.mod_revision,
                )
                return

    await asyncio.gather(*(increment() for _ in range(12)))
    assert (await state.get("count")).value == b"12"


async def test_a_fenced_write_needs_the_same_incarnation_of_the_fence(states):
    state = states.connect()
    fence = Fence("leader", await state.put("leader", b"me"))
    await state.put("leader", b"me, again")
    revision = await state.put("x", b"1", fence=fence)
    await state.compare_and_set("x", b"2", expected_mod_revision=revision, fence=fence)

    await state.delete("leader")
    await state.put("leader", b"another")
    with pytest.raises(Conflict):
        await state.put("x", b"3", fence=fence)
    with pytest.raises(Conflict):
        await state.compare_and_set("y", b"3", expected_mod_revision=0, fence=fence)
    with pytest.raises(Conflict):
        await state.delete("x", fence=fence)
    assert (await state.get("x")).value == b"2"


async def test_a_revoked_lease_takes_its_keys_along(states):
    state = states.connect()
    lease = await state.grant_lease(10)
    await state.put("mine", b"", lease=lease)
    await state.put("kept", b"")
    assert (await state.get("mine")).lease_id == lease.lease_id
    assert not lease.is_lost
    await lease.revoke()
    await lease.revoke()
    assert lease.is_lost
    await asyncio.wait_for(lease.wait_lost(), 5)
    assert keys(await state.list("")) == {"kept"}
    with pytest.raises(Conflict):
        await state.put("late", b"", lease=lease)


async def test_keys_of_a_client_that_vanished_go_after_the_ttl(states):
    state, other = states.connect(), states.connect()
    lease = await state.grant_lease(1)
    await state.put("mine", b"", lease=lease)
    async with watching(other) as take:
        assert keys(await take()) == {"mine"}
        await state.close()
        assert lease.is_lost
        assert seen(await take()) == ("mine", None)


async def test_watch_gives_a_snapshot_then_every_change_in_order(states):
    state = states.connect()
    await state.put("a/1", b"old")
    async with watching(states.connect(), "a/") as take:
        assert keys(await take()) == {"a/1"}
        await state.put("a/2", b"new")
        await state.put("b/1", b"elsewhere")
        await state.put("a/1", b"changed")
        await state.delete("a/2")
        got = [await take() for _ in range(3)]
    assert [seen(item) for item in got] == [("a/2", b"new"), ("a/1", b"changed"), ("a/2", None)]
    revisions = [getattr(item, "entry", item).mod_revision for item in got]
    assert revisions == sorted(revisions)


async def test_watch_resumes_after_a_restart_without_a_gap(states):
    state = states.connect()
    await state.put("k", b"0")
    async with watching(states.connect()) as take:
        assert keys(await take()) == {"k"}
        await state.put("k", b"1")
        assert seen(await take()) == ("k", b"1")
        states.stop()
        states.start()
        await put_when_reachable(state, "k", b"2")
        await state.put("k", b"3")
        values = [seen(await take())[1]]
        while values[-1] != b"3":
            values.append(seen(await take())[1])
    # A write whose answer was lost is repeated, so b"2" may stand there twice.
    assert values in ([b"2", b"3"], [b"2", b"2", b"3"])


async def test_watch_starts_anew_after_compaction(states):
    state = states.connect()
    async with watching(states.connect()) as take:
        assert keys(await take()) == set()
        await state.put("k", b"1")
        assert seen(await take()) == ("k", b"1")
        states.stop()
        states.start()
        await put_when_reachable(state, "k", b"2")
        # Whether the watch is back before or after this, it ends up with all keys.
        await state.put("j", b"1")
        await state.put("j", b"2")
        await states.compact()
        await state.put("last", b"1")
        held: dict[str, bytes | None] = {}
        while "last" not in held:
            item = await take()
            if isinstance(item, Snapshot):
                held = {entry.key: entry.value for entry in item.entries}
            else:
                held |= dict([seen(item)])
    assert held == {"k": b"2", "j": b"2", "last": b"1"}


async def test_watch_starts_anew_when_the_server_lost_its_data(states):
    state = states.connect()
    for number in range(5):
        await state.put(f"k/{number}", b"")
    async with watching(states.connect()) as take:
        assert len(keys(await take())) == 5
        states.stop()
        states.wipe_while_stopped()
        states.start()
        item = await take()
        assert keys(item) == set()
        await put_when_reachable(state, "k/new", b"")
        assert seen(await take()) == ("k/new", b"")


async def test_calls_raise_unavailable_while_it_is_down_and_work_again_after(states):
    state = states.connect(timeout_s=0.2)
    await put_when_reachable(state, "x", b"1")
    states.stop()
    try:
        calls = (
            state.get("x"),
            state.list(""),
            state.put("x", b"2"),
            state.compare_and_set("x", b"2", expected_mod_revision=0),
            state.delete("x"),
            state.grant_lease(5),
        )
        results = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        states.start()
    assert [type(result) for result in results] == [Unavailable] * len(calls)
    await put_when_reachable(state, "x", b"3")
    assert (await states.connect().get("x")).value == b"3"


async def test_a_closed_client_refuses_calls_and_ends_its_watches(states):
    state = states.connect()

    async def follow() -> list[WatchItem]:
        return [item async for item in state.watch("")]

    async with watching(state) as take:
        await take()
        watch = asyncio.create_task(follow())
        await states.connect().put("x", b"")
        await take()
        await state.close()
        await asyncio.wait_for(watch, 5)
    with pytest.raises(Unavailable):
        await state.get("x")
