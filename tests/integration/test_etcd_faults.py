"""What only a real etcd can show: frozen servers, leases over a restart, several endpoints."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gearfall.core.errors import Conflict, Unavailable
from gearfall.core.ids import RouterId
from gearfall.core.records import RouterRecord, SchedulerRecord
from gearfall.infra.local.local_servers import LocalServer, free_ports
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.election import campaign, wait_deposed
from gearfall.infra.state.etcd_state import EtcdState

A = SchedulerRecord("a", "127.0.0.1:1")
B = SchedulerRecord("b", "127.0.0.1:2")


@contextlib.asynccontextmanager
async def connected(
    endpoints: str, prefix: str, timeout_s: float = 1.5
) -> AsyncIterator[EtcdState]:
    state = EtcdState(endpoints, prefix=prefix, timeout_s=timeout_s)
    try:
        yield state
    finally:
        await state.close()


async def test_a_leader_cut_off_from_etcd_is_deposed_and_can_not_write_later(
    etcd_server: LocalServer,
):
    async with (
        connected(etcd_server.url, "/cut-off/") as first,
        connected(etcd_server.url, "/cut-off/") as second,
    ):
        lease = await first.grant_lease(2)
        fence = await campaign(first, A, lease)
        deposed = asyncio.create_task(wait_deposed(first, fence, lease))
        etcd_server.pause()
        try:
            await asyncio.wait_for(deposed, 20)
            assert lease.is_lost
        finally:
            etcd_server.resume()
        other = await asyncio.wait_for(campaign(second, B, await second.grant_lease(10)), 20)
        with pytest.raises(Conflict):
            await first.put("x", b"late", fence=fence)
        await second.put("x", b"", fence=other)


async def test_a_frozen_etcd_costs_a_call_its_deadline_and_no_more(etcd_server: LocalServer):
    async with connected(etcd_server.url, "/frozen/", timeout_s=0.1) as state:
        await state.put("x", b"1")
        etcd_server.pause()
        try:
            async with asyncio.timeout(10):
                with pytest.raises(Unavailable):
                    await state.get("x")
        finally:
            etcd_server.resume()


async def test_a_lease_and_its_keys_outlive_a_restart_of_etcd(etcd_server: LocalServer):
    async with connected(etcd_server.url, "/restart/") as state:
        lease = await state.grant_lease(10)
        await state.put("x", b"1", lease=lease)
        assert await lease._is_renewed()
        etcd_server.kill()
        await lease._call.code()
        etcd_server.start()
        assert not await lease._is_renewed(), "the stream has ended, the lease has not"
        assert await lease._is_renewed()
        assert not lease.is_lost
        entry = await state.get("x")
        assert entry is not None
        assert entry.lease_id == lease.lease_id


async def test_a_lease_that_ended_at_etcd_is_noticed_at_the_next_renewal(etcd_server: LocalServer):
    async with (
        connected(etcd_server.url, "/ended/") as state,
        connected(etcd_server.url, "/ended/") as other,
    ):
        lease = await state.grant_lease(2)
        stolen = await other.grant_lease(10)
        stolen._lease_id = lease.lease_id
        await stolen.revoke()
        await asyncio.wait_for(lease.wait_lost(), 10)


async def test_calls_go_to_the_endpoint_that_lives(etcd_server: LocalServer):
    (dead,) = free_ports(1)
    endpoints = f"http://127.0.0.1:{dead},{etcd_server.url}"
    async with connected(endpoints, "/several/") as state:
        for number in range(20):
            await state.put("x", str(number).encode())
        entry = await state.get("x")
        assert entry is not None
        assert entry.value == b"19"


async def test_the_view_follows_a_real_etcd_over_a_restart(etcd_server: LocalServer):
    async with connected(etcd_server.url, "/view/") as state:
        cluster = Cluster(state)
        await cluster.start()
        lease = await cluster.grant_lease(10)
        record = RouterRecord(RouterId("r"), "127.0.0.1:1", "127.0.0.1:2")
        await cluster.wait_seen(await cluster.put_router(record, lease=lease))
        assert cluster.view.routers == {"r": record}
        etcd_server.kill()
        etcd_server.start()
        await lease.revoke()
        async with asyncio.timeout(10):
            async for _ in cluster.changes():
                if not cluster.view.routers:
                    break
        await cluster.stop()
