"""A drain over HTTP: for whoever knows the cluster's secret, and the same as over gRPC."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest

from gearfall.infra.net.metrics_server import serving_metrics
from services.worker.drain_door import drain_route
from services.worker.service import WorkerService
from tests.services.worker.worker_site import Site

SECRET = "between us"
KNOWN = {"Authorization": f"Bearer {SECRET}"}


class Door:
    """A worker and its HTTP server."""

    def __init__(self, site: Site, address: str) -> None:
        self.site, self.url = site, f"http://{address}"

    async def post(self, query: str = "", headers: dict[str, str] | None = None) -> httpx.Response:
        async with httpx.AsyncClient() as client:
            return await client.post(f"{self.url}/drain{query}", headers=headers or {})


async def opened(stack: AsyncExitStack, secret: str) -> Door:
    site = await Site(stack).open()
    route = drain_route(WorkerService(site.host), secret)
    serving = serving_metrics("127.0.0.1:0", lambda: b"metrics", [route])
    return Door(site, await stack.enter_async_context(serving))


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with AsyncExitStack() as stack:
        yield await opened(stack, SECRET)


async def test_a_notice_drains_the_worker_and_says_what_could_not_be_saved(door: Door) -> None:
    engine = await door.site.ready()
    await door.site.running(engine)
    reply = await door.post("?deadline_s=0", KNOWN)
    assert reply.status_code == 200
    assert reply.json() == {
        "migrated_jobs": 0,
        "finished_jobs": 0,
        "lost_job_ids": ["job-1"],
        "migrations": [],
    }
    assert engine.is_gone
    again = await door.post("?deadline_s=0", KNOWN)
    assert again.json()["lost_job_ids"] == []


@pytest.mark.parametrize(
    ("query", "headers", "status", "kind"),
    [
        ("?deadline_s=1", {}, 401, "Unauthenticated"),
        ("?deadline_s=1", {"Authorization": "Bearer between"}, 401, "Unauthenticated"),
        ("", KNOWN, 400, "InvalidRequest"),
        ("?deadline_s=soon", KNOWN, 400, "InvalidRequest"),
        ("?deadline_s=nan", KNOWN, 400, "InvalidRequest"),
        ("?deadline_s=-1", KNOWN, 400, "InvalidRequest"),
        ("?deadline_s=1e9", KNOWN, 400, "InvalidRequest"),
    ],
)
async def test_whoever_may_not_or_asks_for_nonsense_changes_nothing(
    door: Door, query: str, headers: dict[str, str], status: int, kind: str
) -> None:
    engine = await door.site.ready()
    reply = await door.post(query, headers)
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)
    await door.site.running(engine)


async def test_a_cluster_without_a_secret_is_not_drained_by_whoever_can_reach_it() -> None:
    async with AsyncExitStack() as stack:
        door = await opened(stack, "")
        engine = await door.site.ready()
        reply = await door.post("?deadline_s=0", KNOWN)
        assert (reply.status_code, reply.json()["error"]["type"]) == (403, "PermissionDenied")
        await door.site.running(engine)


async def test_a_look_is_no_drain_and_the_metrics_are_where_they_were(door: Door) -> None:
    async with httpx.AsyncClient() as client:
        assert (
            await client.get(f"{door.url}/drain?deadline_s=0", headers=KNOWN)
        ).status_code == 405
        assert (await client.get(f"{door.url}/metrics")).content == b"metrics"
