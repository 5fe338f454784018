"""Replicas come with the load, before any job waits."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from gearfall.client import AsyncClient
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, ReplicaState, Stage
from gearfall.demo import catalogue
from gearfall.infra.cluster import Cluster
from gearfall.infra.etcd_state import EtcdState
from gearfall.infra.failpoints import RULES_VARIABLE
from tests.cluster_host import ClusterHost

NAME = ModelName("arith")
BUSY = DeploymentName("busy")
LATEST_S = 60.0
SLOWLY = {RULES_VARIABLE: "engine.decode=delay:0.02"}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterHost]:
    """Two nodes with a worker each; a token takes 20 ms."""
    home = tmp_path_factory.mktemp("nodes") / "home"
    host = ClusterHost(home, "--nodes", "2", environment=SLOWLY)
    yield host
    assert host.stop() == 0


@pytest.fixture
async def cluster(nodes: ClusterHost) -> AsyncIterator[Cluster]:
    """What the services see."""
    state = EtcdState(nodes.facts.etcd_url)
    followed = Cluster(state)
    await followed.start()
    yield followed
    await followed.stop()
    await state.close()


async def until(cluster: Cluster, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LATEST_S):
        async for _ in cluster.changes():
            if holds():
                return


def ready(cluster: Cluster) -> set[str]:
    """Return the nodes on which the model is up."""
    replicas = cluster.view.replicas.values()
    return {each.node_id for each in replicas if each.state is ReplicaState.READY}


async def test_a_second_replica_comes_before_anybody_waits(
    nodes: ClusterHost, cluster: Cluster
) -> None:
    async with AsyncClient(nodes.addresses["grpc"]) as client:
        path = str(catalogue.checkpoint_path("arith-small"))
        _ = [item async for item in client.register_model(NAME, path)]
        stage = (Stage(NAME),)
        await client.deploy(
            DeploymentRecord(BUSY, stage, min_replicas=1, max_replicas=2, target_jobs=1)
        )
        await until(cluster, lambda: len(ready(cluster)) == 1)

        waited: list[object] = []

        async def ask() -> None:
            await client.generate(BUSY, "1+1=", max_tokens=100, ignore_eos=True, temperature=0.0)

        async def watch() -> None:
            async for _ in cluster.changes():
                waited.extend(cluster.view.demand.values())

        watching = asyncio.create_task(watch())
        asking = [asyncio.create_task(ask()) for _ in range(6)]
        await until(cluster, lambda: bool(cluster.view.load))
        while len(ready(cluster)) < 2:
            done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            asking = [each for each in asking if each not in done]
            asking += [asyncio.create_task(ask()) for each in done if each.result() is None]
        assert ready(cluster) == {"node-1", "node-2"}
        assert not waited, "six jobs fit the slots of one replica"
        await asyncio.gather(*asking)
        watching.cancel()

        load = next(iter(cluster.view.load.values()))
        assert load.arrived_jobs >= 6
        assert load.arrived_prompt_tokens >= len("1+1=") * load.arrived_jobs
