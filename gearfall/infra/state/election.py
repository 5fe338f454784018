"""Leader election on one key of cluster state; the winner's fence protects every later write."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any, cast

from gearfall.core.errors import Conflict, Unavailable
from gearfall.core.ports import (
    ClusterState,
    Fence,
    KeyDeleted,
    KeyPut,
    Lease,
    Snapshot,
    StateEntry,
    WatchItem,
)
from gearfall.core.records import SchedulerRecord
from gearfall.infra.state.cluster_keys import LEADER_KEY, encode_record


async def campaign(state: ClusterState, record: SchedulerRecord, lease: Lease) -> Fence:
    """Wait until this scheduler leads and return the fence for its writes.

    The leader key lies under `lease`: leadership ends when the lease is revoked or lost. Raises
    Unavailable when the lease is lost before the election is won.
    """
    win = asyncio.create_task(_win(state, encode_record(record), lease), name="election")
    lost = asyncio.create_task(lease.wait_lost(), name="election-lease")
    try:
        await asyncio.wait((win, lost), return_when=asyncio.FIRST_COMPLETED)
        if lease.is_lost:
            raise Unavailable("the lease was lost before the election was won")
        return await win
    finally:
        await _end(win, lost)


async def wait_deposed(state: ClusterState, fence: Fence, lease: Lease) -> None:
    """Return when leadership under `fence` is over or can't be counted on any more.

    That is when another holds the leader key, nobody does, or the lease is lost.
    """
    replaced = asyncio.create_task(_wait_replaced(state, fence), name="leader-watch")
    lost = asyncio.create_task(lease.wait_lost(), name="leader-lease")
    try:
        done, _ = await asyncio.wait((replaced, lost), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await _end(replaced, lost)


async def resign(lease: Lease) -> None:
    """Give leadership up at once, so that another scheduler need not wait for the lease's end."""
    await lease.revoke()


async def _win(state: ClusterState, value: bytes, lease: Lease) -> Fence:
    while True:
        async with _watching_leader(state) as items:
            async for item in items:
                holder = _holder(item)
                if holder is None:
                    try:
                        holder = await _claim(state, value, lease)
                    except Unavailable:
                        break  # a new watch waits until the state is back
                if holder is not None and holder.lease_id == lease.lease_id:
                    return Fence(LEADER_KEY, holder.create_revision)
            else:
                raise Unavailable("cluster state was closed before the election was won")


async def _claim(state: ClusterState, value: bytes, lease: Lease) -> StateEntry | None:
    """Try to become the holder and return whoever holds the key then.

    Reads the key back, because a write whose answer got lost may have succeeded.
    """
    with contextlib.suppress(Conflict):
        await state.compare_and_set(LEADER_KEY, value, expected_mod_revision=0, lease=lease)
    return await state.get(LEADER_KEY)


async def _wait_replaced(state: ClusterState, fence: Fence) -> None:
    async with _watching_leader(state) as items:
        async for item in items:
            holder = _holder(item)
            if holder is None or holder.create_revision != fence.create_revision:
                return


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _holder(item: WatchItem) -> StateEntry | None:
    match item:
        case Snapshot(entries):
            return next((entry for entry in entries if entry.key == LEADER_KEY), None)
        case KeyPut(entry):
            return entry
        case KeyDeleted():
            return None


def _watching_leader(state: ClusterState) -> contextlib.aclosing[AsyncGenerator[WatchItem]]:
    return contextlib.aclosing(cast("AsyncGenerator[WatchItem]", state.watch(LEADER_KEY)))
