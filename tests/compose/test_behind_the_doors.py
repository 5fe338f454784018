"""Cold models on two nodes in containers, and what the containers show of themselves."""

import asyncio

import pytest

from gearfall.client import AsyncClient
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from tests.compose.compose_cluster import SERVICES, Containers
from tests.compose.struck_cluster import StruckCluster, replicas_of

OURS = tuple(service for service in SERVICES if service not in {"etcd", "redis"})
REQUESTS = 200


@pytest.fixture
def cluster(healed: Containers, client: AsyncClient) -> StruckCluster:
    return StruckCluster(healed, client)


async def test_many_requests_for_a_cold_model_cause_one_load(cluster: StruckCluster) -> None:
    name = "asked-by-many"
    await cluster.register(name, "/opt/demo/arith-small")
    answers = await asyncio.gather(
        *(
            cluster.client.generate(name, "2+3=", temperature=0.0, max_tokens=8)
            for _ in range(REQUESTS)
        )
    )
    assert {answer.text for answer in answers} == {"5"}
    for message, services in (
        ("model loaded", ("store-1", "store-2")),
        ("replica ready", ("worker-1", "worker-2")),
    ):
        lines = [line for service in services for line in cluster.containers.log_lines(service)]
        found = [line for line in lines if line.get("message") == message]
        assert len([line for line in found if line.get("model") == name]) == 1, message


async def test_an_idle_model_scales_to_zero_and_comes_back(cluster: StruckCluster) -> None:
    name = "brief"
    assert await cluster.answer_cold(name) == "5"
    stages = (Stage(ModelName(name)),)
    await cluster.client.deploy(
        DeploymentRecord(DeploymentName("brief-alone"), stages, keep_alive_s=0.2)
    )
    await cluster.until(cluster.status, lambda status: not replicas_of(status, name))
    again = await cluster.client.generate(name, "2+3=", temperature=0.0, max_tokens=8)
    assert again.text == "5"
    await cluster.client.remove_deployment("brief-alone")


async def test_a_store_that_comes_back_still_has_its_models(cluster: StruckCluster) -> None:
    name = "outlives-the-store"
    await cluster.register(name, "/opt/demo/arith-small")
    for store in ("store-1", "store-2"):
        await asyncio.to_thread(cluster.containers.restart, store)
        await asyncio.to_thread(cluster.containers.wait_healthy, store)
    await cluster.until(cluster.status, lambda status: len(status.nodes) == 2)
    answer = await cluster.client.generate(name, "2+3=", temperature=0.0, max_tokens=8)
    assert answer.text == "5"


@pytest.mark.parametrize("service", SERVICES)
def test_only_the_router_is_published(containers: Containers, service: str) -> None:
    published = containers.docker("port", containers.find(service)).splitlines()
    assert len(published) == (2 if service == "router" else 0)
    assert all("-> 127.0.0.1:" in line for line in published)


@pytest.mark.parametrize("service", SERVICES)
def test_nobody_is_root(containers: Containers, service: str) -> None:
    user = containers.docker("exec", containers.find(service), "id", "-u")
    assert user.strip() == "10001"


@pytest.mark.parametrize("service", OURS)
def test_a_service_can_write_nothing_but_its_volumes(containers: Containers, service: str) -> None:
    root = "touch /opt/gearfall/mark 2>&1 || touch /home/gearfall/mark 2>&1 || echo refused"
    said = containers.docker("exec", containers.find(service), "sh", "-c", root)
    assert said.splitlines()[-1] == "refused"
    assert said.count("Read-only file system") == 2


def test_the_image_has_no_compiler(containers: Containers) -> None:
    look = "command -v g++ cc gcc c++ cmake ninja || echo none"
    said = containers.docker("exec", containers.find("worker-1"), "sh", "-c", look)
    assert said.strip() == "none"
