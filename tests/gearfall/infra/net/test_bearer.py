"""Keys at gRPC doors: which header opens what, over a real server."""

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gearfall.core.errors import Unauthenticated
from gearfall.infra.net.bearer import BearerInterceptor, bearer_metadata, check_bearer, tenant_of
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_server import start_server
from gearfall.pb import scheduler_pb2, scheduler_pb2_grpc

NAME = "gearfall.v1.Scheduler"


class Scheduler(scheduler_pb2_grpc.SchedulerServicer):
    async def GetStatus(self, request, context):
        return scheduler_pb2.SchedulerStatus(scheduler_id="s1")

    async def Explain(self, request, context):
        raise NotImplementedError


@pytest.fixture
async def channel():
    server = await start_server(
        "127.0.0.1:0",
        lambda s: scheduler_pb2_grpc.add_SchedulerServicer_to_server(Scheduler(), s),
        (NAME,),
        interceptors=(BearerInterceptor({NAME: ("one", "tw\u00f6")}),),
    )
    async with open_channel(server.address) as opened:
        yield opened
    await server.stop(0)


@pytest.mark.parametrize("header", ["Bearer one", "bearer one", "BEARER  one ", "Bearer tw\u00f6"])
def test_a_known_key_opens(header):
    check_bearer(header, ("one", "tw\u00f6"))


@pytest.mark.parametrize(
    "header", ["", "one", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Basic one", "Bearer \0"]
)
def test_anything_else_does_not(header):
    with pytest.raises(Unauthenticated):
        check_bearer(header, ("one", "two"))
    check_bearer(header, ())


@pytest.mark.parametrize("claimed", ["", "acme"])
def test_each_of_several_keys_is_a_tenant_of_its_own(claimed):
    keys = ("one", "two")
    one, two = (tenant_of(f"Bearer {key}", keys, claimed) for key in keys)
    assert one != two
    assert one == tenant_of("bearer  one ", ("two", "one", "three"), claimed)
    assert one != tenant_of("Bearer one", keys, "another")
    assert "one" not in one
    assert tenant_of("Bearer one", ("one",), claimed) == tenant_of("", (), claimed) == claimed


async def test_the_guarded_service_asks_for_a_key(channel):
    call = scheduler_pb2_grpc.SchedulerStub(channel).GetStatus
    request = scheduler_pb2.SchedulerStatusRequest()
    for metadata in (bearer_metadata(""), bearer_metadata("other")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request, metadata=metadata, timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (await call(request, metadata=bearer_metadata("one"), timeout=5)).scheduler_id == "s1"


async def test_health_stays_open_and_can_be_watched(channel):
    stub: Any = health_pb2_grpc.HealthStub(channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=5)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
