"""Changes record by record: whoever applies them has what the view has."""

import asyncio
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName
from gearfall.core.ports import KeyDeleted, KeyPut, Snapshot, StateEntry
from gearfall.infra.state.change_feed import Change, ChangeFeed, Changes
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_keys import encode_record
from gearfall.infra.state.cluster_view import ClusterView, ViewBuilder
from gearfall.infra.state.memory_state import MemoryState, MemoryStateServer
from tests.gearfall.infra.state.test_cluster import DEMAND, TINY, following

KEYS = {
    "models/tiny": encode_record(TINY),
    "models/other": encode_record(replace(TINY, name=ModelName("other"))),
    "demand/tiny/r": encode_record(DEMAND),
    "what/ever": b"?",
}


class Index:
    """A follower's own copy of the models and the demand."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[Any, Any]] = {}

    def take_in(self, changes: Changes) -> None:
        if changes.restart is not None:
            view = changes.restart
            self.tables = {"models": dict(view.models), "demand": dict(view.demand)}
        for change in changes.records:
            if change.record is None:
                # It may have come and gone since the last look.
                self.tables[change.kind].pop(change.record_id, None)
            else:
                self.tables[change.kind][change.record_id] = change.record


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(sorted(KEYS))),
        st.tuples(st.just("delete"), st.sampled_from(sorted(KEYS))),
        st.tuples(st.just("restart"), st.just("")),
        st.tuples(st.just("take"), st.just("")),
    ),
    max_size=40,
)


@given(STEPS)
def test_an_index_fed_with_changes_is_the_view(steps: list[tuple[str, str]]) -> None:
    builder, held = ViewBuilder(), dict[str, StateEntry]()
    builder.apply(Snapshot((), 1))
    feed, index = ChangeFeed(builder.view), Index()
    index.take_in(feed.take())
    for revision, (step, key) in enumerate(steps, start=2):
        if step == "take":
            index.take_in(feed.take())
            continue
        if step == "put":
            held[key] = StateEntry(key, KEYS[key], revision, revision)
            applied = builder.apply(KeyPut(held[key]))
        elif step == "delete":
            held.pop(key, None)
            applied = builder.apply(KeyDeleted(key, revision))
        else:
            applied = builder.apply(Snapshot(tuple(held.values()), revision))
        if applied.is_restart:
            feed.restart(builder.view)
        else:
            feed.add([Change(*applied.change)] if applied.change else [], builder.revision)
    last = feed.take()
    index.take_in(last)
    assert index.tables == {"models": builder.view.models, "demand": builder.view.demand}
    assert last.revision == builder.revision
    assert feed.take() == Changes(None, (), builder.revision)


async def test_a_follower_that_falls_behind_gets_each_record_once() -> None:
    async with following(MemoryState()) as cluster:
        with cluster.following() as feed:
            assert feed.take().restart == cluster.view
            for parameters in range(5):
                revision = await cluster.put_model(replace(TINY, parameters=parameters))
            await cluster.wait_seen(revision)
            (change,) = feed.take().records
        assert change == Change("models", "tiny", replace(TINY, parameters=4))


async def test_a_deletion_and_a_new_listing_reach_a_follower() -> None:
    server = MemoryStateServer()
    async with following(MemoryState(server)) as cluster:
        await cluster.wait_seen(await cluster.put_model(TINY))
        changes = cluster.record_changes()
        assert (await anext(changes)).restart == cluster.view
        waiting = asyncio.ensure_future(anext(changes))
        await cluster.delete_model(TINY.name)
        found = await asyncio.wait_for(waiting, 10)
        assert found.records == (Change("models", "tiny", None),)
        waiting = asyncio.ensure_future(anext(changes))
        server.wipe()
        found = await asyncio.wait_for(waiting, 10)
        assert (found.restart, found.records) == (ClusterView(revision=1, losses=1), ())
        await changes.aclose()


async def test_changes_end_when_the_cluster_stops() -> None:
    cluster = Cluster(MemoryState())
    await cluster.start()

    async def count() -> int:
        return sum([1 async for _ in cluster.record_changes()])

    counting = asyncio.create_task(count())
    await cluster.wait_seen(await cluster.put_model(TINY))
    await cluster.stop()
    assert await asyncio.wait_for(counting, 10) >= 1
