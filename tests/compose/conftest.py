"""The cluster that `make compose-test` started; without one the tests say so and are skipped."""

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from gearfall.client import AsyncClient
from tests.compose.compose_cluster import PROJECT_VARIABLE, SERVICES, Containers
from tests.compose.struck_cluster import StruckCluster


@pytest.fixture(scope="session")
def containers() -> Containers:
    """The running containers."""
    if PROJECT_VARIABLE not in os.environ:
        pytest.skip("no cluster in containers: `make compose-test` starts one")
    return Containers(os.environ[PROJECT_VARIABLE])


@pytest.fixture
def healed(containers: Containers) -> Iterator[Containers]:
    """The containers, all of them well before and after."""
    containers.wait_healthy(*SERVICES)
    yield containers
    containers.wait_healthy(*SERVICES)


@pytest.fixture
async def struck(healed: Containers, client: AsyncClient) -> AsyncIterator[StruckCluster]:
    """The cluster with its model served on both nodes; nothing is left over when a test ends."""
    cluster = StruckCluster(healed, client)
    await cluster.prepare()
    yield cluster
    await cluster.check_nothing_is_left()
