"""This node's part of the models' records, while others write and read them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gearfall.core.ids import ModelName, NodeId
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_keys import key_of
from gearfall.infra.state.memory_state import MemoryState
from services.store.models.ledger import Ledger
from services.store.models.model_registry import REVISIONS_BETWEEN_NOTES, ModelRegistry
from services.store.tiers.ssd_tier import SsdTier
from services.store.tiers.stored_model import StoredModel
from tests.services.store.source_directories import write_source

NAME = ModelName("tiny")


class SlowState(MemoryState):
    """Answers a read of the model's record only when the test says so, with what stood there."""

    def __init__(self) -> None:
        super().__init__()
        self.is_slow = False
        self.was_asked = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def get(self, key):
        found = await super().get(key)
        if self.is_slow and key == key_of("models", NAME):
            self.is_slow = False
            self.was_asked.set()
            await self.may_answer.wait()
        return found


@asynccontextmanager
async def site(path: Path) -> AsyncIterator[tuple[Cluster, ModelRegistry, StoredModel]]:
    state, tier, ledger = SlowState(), SsdTier(path / "data"), Ledger(path / "data")
    tier.open()
    ledger.open()
    model = tier.register(NAME, str(write_source(path / "src")), lambda done, total: None)
    cluster = Cluster(state)
    await cluster.start()
    yield cluster, ModelRegistry(cluster, NodeId("node-1"), ledger), model
    await cluster.stop()
    await state.close()
    tier.close()


async def test_a_model_whose_record_is_being_written_was_not_removed(tmp_path: Path):
    """It is on disk and not yet in state: whoever looks meanwhile must not take it away."""
    async with site(tmp_path) as (cluster, registry, model):
        state = cluster.state
        assert isinstance(state, SlowState)
        state.is_slow = True
        looking = asyncio.create_task(registry.reconcile({NAME: model}))
        await state.was_asked.wait()
        await registry.publish(model)
        state.may_answer.set()
        assert await looking == []
        assert await state.get(key_of("models", NAME)) is not None


async def test_a_model_that_was_published_and_is_gone_was_removed(tmp_path: Path):
    async with site(tmp_path) as (cluster, registry, model):
        await registry.publish(model)
        await cluster.delete_model(NAME)
        async for _ in cluster.changes():
            if NAME not in cluster.view.models:
                break
        assert await registry.reconcile({NAME: model}) == [NAME]


async def published(cluster: Cluster, registry: ModelRegistry, model: StoredModel) -> None:
    """Publish it; return when the view shows it."""
    await registry.publish(model)
    await cluster.wait_until(lambda view: NAME in view.models)


async def is_known_as_not_removed(
    cluster: Cluster, registry: ModelRegistry, model: StoredModel
) -> None:
    """It is published again, and only one that is removed from then on was removed."""
    assert await registry.reconcile({NAME: model}) == []
    await cluster.wait_until(lambda view: NAME in view.models)
    await cluster.delete_model(NAME)
    await cluster.wait_until(lambda view: NAME not in view.models)
    assert await registry.reconcile({NAME: model}) == [NAME]


async def test_state_that_goes_back_while_it_is_watched_removes_nothing(tmp_path: Path):
    """However far it has come again by the time that a store looks."""
    async with site(tmp_path) as (cluster, registry, model):
        server = cluster.state.server  # type: ignore[attr-defined]
        await cluster.state.put("incarnation", b"first")
        backup = dict(server.entries), server.revision
        await published(cluster, registry, model)
        server.restore(*backup)
        await cluster.wait_until(lambda view: NAME not in view.models)
        for _ in range(5):
            await cluster.state.put("learned/other", b"{}")
        await is_known_as_not_removed(cluster, registry, model)


async def test_state_that_was_restored_while_all_was_down_removes_nothing(tmp_path: Path):
    async with site(tmp_path) as (cluster, registry, model):
        server = cluster.state.server  # type: ignore[attr-defined]
        await cluster.state.put("incarnation", b"first")
        backup = dict(server.entries), server.revision
        await published(cluster, registry, model)
        await cluster.stop()
        server.restore(*backup)
        ledger, again = Ledger(tmp_path / "data"), Cluster(cluster.state)
        ledger.open()
        await again.start()
        later = ModelRegistry(again, NodeId("node-1"), ledger)
        await is_known_as_not_removed(again, later, model)
        await again.stop()


@pytest.mark.parametrize(("later", "after"), [(300, REVISIONS_BETWEEN_NOTES), (20, 1)])
async def test_a_restored_state_that_others_wrote_to_first_removes_nothing(
    tmp_path: Path, later: int, after: int
):
    """What the store saw counts, not what it published: noted now and then, and as it stops."""
    async with site(tmp_path) as (cluster, registry, model):
        server = cluster.state.server  # type: ignore[attr-defined]
        await cluster.state.put("incarnation", b"first")
        backup = dict(server.entries), server.revision
        await published(cluster, registry, model)
        assert await registry.reconcile({NAME: model}) == []
        await worked_on(cluster, later)
        registry.note_seen(after=after)
        await cluster.stop()
        server.restore(*backup)
        for _ in range(5):
            await cluster.state.put("learned/other", b"{}")
        async with started_again(tmp_path, cluster) as (again, later_registry):
            await is_known_as_not_removed(again, later_registry, model)


async def test_a_ledger_without_a_revision_gets_one(tmp_path: Path):
    async with site(tmp_path) as (cluster, registry, model):
        server = cluster.state.server  # type: ignore[attr-defined]
        await cluster.state.put("incarnation", b"first")
        backup = dict(server.entries), server.revision
        await published(cluster, registry, model)
        path = tmp_path / "data" / "published.json"
        content = json.loads(path.read_bytes())
        del content["revision"]
        path.write_text(json.dumps(content))
        async with started_again(tmp_path, cluster) as (_, upgraded):
            assert await upgraded.reconcile({NAME: model}) == []
        await cluster.stop()
        server.restore(*backup)
        async with started_again(tmp_path, cluster) as (again, later):
            await is_known_as_not_removed(again, later, model)


async def test_the_same_bytes_again_are_noted_with_the_later_revision(tmp_path: Path):
    async with site(tmp_path) as (cluster, registry, model):
        await published(cluster, registry, model)
        await cluster.delete_model(NAME)
        await worked_on(cluster, 50)
        await registry.publish(model)
        ledger = Ledger(tmp_path / "data")
        ledger.open()
        entry = await cluster.state.get(key_of("models", NAME))
        assert entry is not None
        assert ledger.revision == entry.mod_revision


async def test_what_a_backup_had_and_somebody_removes_later_was_removed(tmp_path: Path):
    """Though this store published it in the life of state before."""
    async with site(tmp_path) as (cluster, registry, model):
        server = cluster.state.server  # type: ignore[attr-defined]
        newer = replace(model, name=ModelName("newer"))
        both = {NAME: model, newer.name: newer}
        await cluster.state.put("incarnation", b"first")
        await registry.publish(model)
        backup = dict(server.entries), server.revision
        await registry.publish(newer)
        await cluster.wait_until(lambda view: view.models.keys() == both.keys())
        server.restore(*backup)
        await cluster.wait_until(lambda view: view.models.keys() == {NAME})
        assert await registry.reconcile(both) == []
        await cluster.delete_model(NAME)
        async with started_again(tmp_path, cluster) as (_, later):
            assert await later.reconcile(both) == [NAME]


async def worked_on(cluster: Cluster, revisions: int) -> None:
    """Others write; return when the view has seen it."""
    for _ in range(revisions):
        revision = await cluster.state.put("learned/other", b"{}")
    await cluster.wait_seen(revision)


@asynccontextmanager
async def started_again(
    path: Path, cluster: Cluster
) -> AsyncIterator[tuple[Cluster, ModelRegistry]]:
    """What the next process of this store sees."""
    ledger, again = Ledger(path / "data"), Cluster(cluster.state)
    ledger.open()
    await again.start()
    yield again, ModelRegistry(again, NodeId("node-1"), ledger)
    await again.stop()


async def test_a_full_disk_keeps_no_model_from_being_published(tmp_path: Path):
    async with site(tmp_path) as (cluster, registry, model):
        # What a ledger writes first is its file under another name.
        (tmp_path / "data" / "published.new").mkdir()
        await registry.publish(model)
        await cluster.wait_until(lambda view: NAME in view.models)
