"""A second store of one name is refused; one that follows a dead one is not."""

from pathlib import Path

import pytest

from gearfall.core.errors import Conflict
from gearfall.core.ids import NodeId
from services.store.lone_node import check_is_free
from tests.services.store.stores import running_store


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
