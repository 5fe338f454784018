"""Writes of one moment share a transaction of a real etcd, each with its own outcome."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gearfall.core.errors import Conflict
from gearfall.core.ports import Fence
from gearfall.infra.local.local_servers import LocalServer
from gearfall.infra.state.etcd_commits import MOST_BYTES, MOST_WRITES
from gearfall.infra.state.etcd_state import EtcdState


@pytest.fixture
async def state(etcd_server: LocalServer) -> AsyncIterator[EtcdState]:
    client = EtcdState(etcd_server.url, prefix="/commits/")
    for entry in (await client.list("")).entries:
        await client.delete(entry.key)
    yield client
    await client.close()


async def put_all(state: EtcdState, values: dict[str, bytes], fence: Fence | None = None):
    writes = (state.put(key, value, fence=fence) for key, value in values.items())
    return await asyncio.gather(*writes, return_exceptions=True)


async def test_writes_of_one_moment_share_a_revision_and_keep_their_values(state):
    values = {f"k{number}": b"%d" % number for number in range(5)}
    assert len(set(await put_all(state, values))) == 1
    found = (await state.list("")).entries
    assert {entry.key: entry.value for entry in found} == values


async def test_one_key_written_twice_in_a_moment_is_written_twice(state):
    values = (b"1", b"2")
    revisions = await asyncio.gather(*(state.put("k", value) for value in values))
    entry = await state.get("k")
    assert entry is not None
    assert len(set(revisions)) == 2
    assert dict(zip(revisions, values, strict=True))[max(revisions)] == entry.value


async def test_a_fence_that_fell_stops_its_own_writes_and_no_others(state):
    fence = Fence("leader", await state.put("leader", b""))
    await state.delete("leader")
    fenced, free = await asyncio.gather(
        put_all(state, {"a": b"", "b": b""}, fence), put_all(state, {"c": b"", "d": b""})
    )
    assert [type(each) for each in fenced] == [Conflict, Conflict]
    assert len(set(free)) == 1
    assert {entry.key for entry in (await state.list("")).entries} == {"c", "d"}


async def test_a_lease_that_ended_stops_its_own_writes_and_no_others(state):
    ended, held = await state.grant_lease(60), await state.grant_lease(60)
    await ended.revoke()
    outcomes = await asyncio.gather(
        *(state.put(f"{each.lease_id}", b"", lease=each) for each in (ended, held)),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], Conflict)
    assert {entry.lease_id for entry in (await state.list("")).entries} == {held.lease_id}


async def test_deletions_of_one_moment_each_say_whether_there_was_something(state):
    await state.put("there", b"")
    gone, none = await asyncio.gather(state.delete("there"), state.delete("not there"))
    assert (gone > 0, none) == (True, 0)


async def test_what_is_too_much_for_one_transaction_is_parted(state):
    large = bytes(MOST_BYTES // 2)
    assert len(set(await put_all(state, dict.fromkeys("abc", large)))) == 3
    many = {f"m{number}": b"" for number in range(MOST_WRITES + 1)}
    assert len(set(await put_all(state, many))) == 2


async def test_a_write_that_was_begun_goes_on_though_its_caller_is_cancelled(state):
    cancelled, kept = (asyncio.create_task(state.put(key, b"")) for key in "ab")
    await asyncio.sleep(0)
    cancelled.cancel()
    revision = await kept
    assert {entry.mod_revision for entry in (await state.list("")).entries} == {revision}
    assert {entry.key for entry in (await state.list("")).entries} == {"a", "b"}
