"""A replica starts on a node that had nothing of its model: its store gets it from the other."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from gearfall.client import AsyncClient
from gearfall.core.ids import DeploymentName, ModelName, NodeId
from gearfall.core.records import DeploymentRecord, ReplicaState, Stage
from gearfall.demo import catalogue
from gearfall.infra.cluster import Cluster
from gearfall.infra.etcd_state import EtcdState
from gearfall.pb import store_pb2
from gearfall.pb.store_pb2_grpc import StoreStub
from tests.cluster_host import ClusterHost

NAME = ModelName("arith")
LATEST_S = 30.0


@pytest.fixture
async def pair(tmp_path) -> AsyncIterator[tuple[AsyncClient, Cluster]]:
    """Two nodes with a worker each, and what the services see of them."""
    host = ClusterHost(tmp_path / "home", "--nodes", "2")
    state = EtcdState(host.facts.etcd_url)
    cluster = Cluster(state)
    try:
        await cluster.start()
        async with AsyncClient(host.addresses["grpc"]) as client:
            yield client, cluster
    finally:
        await cluster.stop()
        await state.close()
        assert host.stop() == 0


async def test_the_second_replica_starts_where_the_model_was_not(
    pair: tuple[AsyncClient, Cluster],
) -> None:
    client, cluster = pair
    path = str(catalogue.checkpoint_path("arith-small"))
    _ = [item async for item in client.register_model(NAME, path)]
    address = cluster.view.nodes[NodeId("node-2")].address
    async with grpc.aio.insecure_channel(address) as channel:
        await StoreStub(channel).DeleteModel(store_pb2.DeleteModelRequest(model=NAME), timeout=9)
    await _until(cluster, lambda: cluster.view.models[NAME].nodes == ("node-1",))

    both = DeploymentRecord(DeploymentName("both"), (Stage(NAME),), min_replicas=2, max_replicas=2)
    await client.deploy(both)
    await _until(cluster, lambda: len(_ready(cluster)) == 2)
    assert _ready(cluster) == {"node-1", "node-2"}
    await _until(cluster, lambda: set(cluster.view.models[NAME].nodes) == {"node-1", "node-2"})

    worker = next(w for w in cluster.view.workers.values() if w.node_id == "node-2")
    reason = cluster.view.assignments[worker.worker_id, NAME].reason
    assert "from remote at 0.25 GB/s (assumed)" in reason
    said = [each.reason for each in (await client.explain_model(NAME)).explanations]
    assert reason in said
    answer = await client.generate("both", "2+3=", temperature=0.0, max_tokens=8)
    assert answer.text == "5"


def _ready(cluster: Cluster) -> set[str]:
    """Nodes that have a ready replica."""
    replicas = cluster.view.replicas.values()
    return {each.node_id for each in replicas if each.state is ReplicaState.READY}


async def _until(cluster: Cluster, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LATEST_S):
        async for _ in cluster.changes():
            if holds():
                return
