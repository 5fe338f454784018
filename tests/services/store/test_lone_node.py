"""A second store of one name is refused; one that follows a dead one is not."""

import asyncio
from pathlib import Path

import pytest

from gearfall.core.errors import Conflict
from gearfall.core.ids import NodeId
from services.store.lone_node import check_is_free
from tests.services.store.stores import TIMEOUT_S, running_store


async def test_a_node_that_has_a_live_store_gets_no_other_one(tmp_path: Path):
    node = NodeId("node-0")
    async with running_store(tmp_path, node=node) as store:
        await store.wait_node(address=store.service.address)
        with pytest.raises(Conflict, match=f"node-0 has a store at {store.service.address}"):
            await check_is_free(store.cluster.view, node)
        await check_is_free(store.cluster.view, NodeId("node-1"))
        left = store.cluster.view
    assert node in left.nodes, "its lease may run on"
    await check_is_free(left, node)


async def test_of_two_that_start_together_the_one_that_is_written_over_ends(tmp_path: Path):
    """Both found the node free: neither had published yet."""
    async with running_store(tmp_path / "a") as first:
        await first.wait_node(address=first.service.address)
        async with running_store(tmp_path / "b", server=first.state.server) as second:
            with pytest.RaisesGroup(pytest.RaisesGroup(Conflict)):
                async with asyncio.timeout(TIMEOUT_S):
                    await first.service.wait_failed()
            await second.wait_node(address=second.service.address)
