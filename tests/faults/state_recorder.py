"""Writes down every change of cluster state in order, for a verdict on its assignments."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gearfall.core.ports import ClusterState, KeyPut, Snapshot, StateEntry, WatchItem
from gearfall.infra.state.cluster_keys import INCARNATION_KEY, decode_entry
from tests.faults.placement_verdict import StateChange, StateListed

Recorded = list[StateChange | StateListed]

_LOOK_AGAIN_S = 0.02


@asynccontextmanager
async def recording(state: ClusterState) -> AsyncIterator[Recorded]:
    """Record from the first listing on; a record that does not decode fails the test.

    What is behind it when the block ends is recorded too.
    """
    recorded: Recorded = []
    has_begun = asyncio.Event()

    async def record() -> None:
        places: dict[str, tuple[str, object]] = {}
        async for item in state.watch(""):
            _take(item, recorded, places)
            has_begun.set()

    task = asyncio.create_task(record())
    try:
        async with asyncio.timeout(10):
            await has_begun.wait()
        yield recorded
        await catch_up(state, recorded)
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def catch_up(state: ClusterState, recorded: Recorded) -> None:
    """Return when everything is recorded that has happened until now."""
    revision = (await state.list("leader")).revision
    async with asyncio.timeout(10):
        while recorded[-1].revision < revision:  # noqa: ASYNC110 - a plain list tells nobody
            await asyncio.sleep(_LOOK_AGAIN_S)


def _take(item: WatchItem, recorded: Recorded, places: dict[str, tuple[str, object]]) -> None:
    if isinstance(item, Snapshot):
        entries = [entry for entry in item.entries if entry.key != INCARNATION_KEY]
        recorded.append(
            StateListed(item.revision, tuple(_change(each, places) for each in entries))
        )
    elif isinstance(item, KeyPut):
        if item.entry.key != INCARNATION_KEY:
            recorded.append(_change(item.entry, places))
    elif item.key in places:
        kind, record_id = places[item.key]
        gone = StateChange(item.mod_revision, kind, record_id, None, at_unix_s=time.time())
        recorded.append(gone)


def _change(entry: StateEntry, places: dict[str, tuple[str, object]]) -> StateChange:
    kind, record_id, record = decode_entry(entry.key, entry.value)
    places[entry.key] = (kind, record_id)
    return StateChange(
        entry.mod_revision, kind, record_id, record, entry.create_revision, time.time()
    )
