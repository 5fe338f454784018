"""Replicas come with the load, before any job waits."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from gearfall.client import AsyncClient
from gearfall.core.gears.gear_plan import Gear, GearPlan, PlacedReplicas, Promise, plan_text
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, ReplicaState, Stage
from gearfall.demo import catalogue
from gearfall.infra.failpoints import RULES_VARIABLE
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.etcd_state import EtcdState
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
        await cluster.wait_until(lambda _: len(ready(cluster)) == 1, timeout_s=LATEST_S)

        waited: list[object] = []

        async def ask() -> None:
            await client.generate(BUSY, "1+1=", max_tokens=100, ignore_eos=True, temperature=0.0)

        async def watch() -> None:
            async for _ in cluster.changes():
                waited.extend(cluster.view.demand.values())

        watching = asyncio.create_task(watch())
        asking = [asyncio.create_task(ask()) for _ in range(6)]
        await cluster.wait_until(lambda view: bool(view.load), timeout_s=LATEST_S)
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


SUMS = DeploymentName("sums-by-gear")
LOW, HIGH = ModelName("low"), ModelName("high")
SHARES = {"node-1": 0.25, "node-2": 0.75}
_ENDED = re.compile(
    r'^gearfall_worker_jobs_ended_total\{.*model="high"\} ([0-9.e+]+)$', re.MULTILINE
)


def gear_plan() -> GearPlan:
    """Up to 50 tokens a second one model on one node; above, another one on both, by shares."""
    promise = Promise(0.9, 0.0, 0.1, 0, 1.0, 0.0, (1.0,))
    return GearPlan(
        *(str(SUMS), 1, 1.0, "a test", "FLOP", {str(LOW): "", str(HIGH): ""}),
        gears=(
            Gear(50.0, (Stage(LOW),), promise),
            Gear(1e6, (Stage(HIGH),), promise, shares={str(HIGH): SHARES}),
        ),
        placement=(
            PlacedReplicas("node-1", str(LOW), 1),
            PlacedReplicas("node-1", str(HIGH), 1),
            PlacedReplicas("node-2", str(HIGH), 1),
        ),
    )


def places(cluster: Cluster) -> set[tuple[str, str]]:
    """Return (node, model) of the plan's models that are up."""
    return {
        (str(each.node_id), str(each.model))
        for each in cluster.view.replicas.values()
        if each.state is ReplicaState.READY and each.model in {LOW, HIGH}
    }


def votes(cluster: Cluster) -> set[int]:
    return {each.gear for each in cluster.view.gear_votes.values()}


def ended(nodes: ClusterHost) -> list[float]:
    """Return how many jobs of the upper gear each node's worker has ended."""
    workers = [each for each in nodes.facts.services if each.service == "worker"]
    shown = [httpx.get(f"http://{each.metrics}/metrics").text for each in workers]
    return [sum(map(float, _ENDED.findall(text))) for text in shown]


async def test_a_shift_up_starts_the_plans_replicas_and_a_shift_down_releases_them(
    nodes: ClusterHost, cluster: Cluster
) -> None:
    async with AsyncClient(nodes.addresses["grpc"]) as client:
        for name, trained in ((LOW, "arith-medium"), (HIGH, "arith-small")):
            path = str(catalogue.checkpoint_path(trained))
            _ = [item async for item in client.register_model(name, path)]
        record = DeploymentRecord(SUMS, (Stage(LOW),), keep_alive_s=0.5)
        await client.deploy(record, gear_plan=plan_text(gear_plan()))
        await cluster.wait_until(lambda _: ("node-1", "low") in places(cluster), timeout_s=LATEST_S)
        both = {("node-1", "high"), ("node-2", "high")}

        async def ask() -> None:
            await client.generate(SUMS, "1+1=", max_tokens=3, ignore_eos=True, temperature=0.0)

        async def ask_on() -> None:
            while not (places(cluster) >= both and votes(cluster) == {1}):
                await ask()

        await asyncio.gather(*(ask_on() for _ in range(6)))
        before = ended(nodes)
        for _ in range(15):
            await asyncio.gather(*(ask() for _ in range(8)))
        ran = [now - then for now, then in zip(ended(nodes), before, strict=True)]
        assert sum(ran) == 120
        assert ran[1] / 120 == pytest.approx(SHARES["node-2"], abs=0.1)

        await cluster.wait_until(
            lambda _: places(cluster) == {("node-1", "low")}, timeout_s=LATEST_S
        )
        await client.remove_deployment(SUMS)
