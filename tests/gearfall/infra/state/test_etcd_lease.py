"""The renewals of a lease against a server that only renews."""

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from aetcd.rpc import rpc_pb2_grpc

from gearfall.infra.state.etcd_lease import EtcdLease
from gearfall.infra.state.etcd_rpc import EtcdStubs, open_etcd_channel, rpc

TTL_S = 600.0
"""Long enough that the lease renews itself in no test."""


class Renewing(rpc_pb2_grpc.LeaseServicer):  # type: ignore[misc]
    async def LeaseKeepAlive(self, requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield rpc.LeaseKeepAliveResponse(ID=request.ID, TTL=int(TTL_S))


async def started(port: int = 0) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server()
    rpc_pb2_grpc.add_LeaseServicer_to_server(Renewing(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, port


async def test_a_lease_is_renewed_though_the_connection_broke_between_two_renewals():
    server, port = await started()
    stubs = EtcdStubs(open_etcd_channel(f"http://127.0.0.1:{port}"))
    lease = EtcdLease(stubs, 7, TTL_S, granted_s=time.monotonic(), timeout_s=5.0)
    assert await lease._is_renewed()
    broken = lease._call
    await server.stop(None)
    await broken.code()
    server, _ = await started(port)
    assert not await lease._is_renewed(), "the stream has ended, the lease has not"
    assert await lease._is_renewed()
    assert not lease.is_lost
    await lease.abandon()
    await stubs.channel.close()
    await server.stop(None)
