"""The scheduler's gRPC face over a real channel."""

import asyncio
from contextlib import AsyncExitStack

import grpc
import pytest

from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_server import start_server
from gearfall.pb import scheduler_pb2 as pb
from gearfall.pb.scheduler_pb2_grpc import SchedulerStub, add_SchedulerServicer_to_server
from services.scheduler.decision_log import DecisionLog
from services.scheduler.service import SchedulerService
from services.scheduler.servicer import SchedulerServicer
from tests.gearfall.scheduling.clusters import demand
from tests.services.scheduler.loop_fleet import Fleet


@pytest.fixture
async def fleet():
    async with AsyncExitStack() as stack:
        opened = await Fleet(stack).open()
        loop = await opened.scheduler("s1")
        log = DecisionLog()
        following = asyncio.create_task(log.run(opened.cluster))
        stack.callback(following.cancel)
        servicer = SchedulerServicer(SchedulerService(opened.cluster, loop, log, "s1"))
        server = await start_server(
            "127.0.0.1:0",
            lambda s: add_SchedulerServicer_to_server(servicer, s),
            ("gearfall.v1.Scheduler",),
        )
        stack.push_async_callback(server.stop, 0.0)
        channel = open_channel(server.address)
        stack.push_async_callback(channel.close)
        opened.stub = SchedulerStub(channel)
        yield opened


async def test_status_names_the_leader(fleet):
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: "small" in v.decisions)
    status = await fleet.stub.GetStatus(pb.SchedulerStatusRequest(), timeout=5)
    assert (status.scheduler_id, status.leader_id, status.is_leader) == ("s1", "s1", True)
    assert status.fence_revision > 0


async def test_explain_gives_the_decision_with_its_alternatives(fleet):
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: "small" in v.decisions)
    reply = await fleet.stub.Explain(pb.ExplainRequest(model="small"), timeout=5)
    decided = [each for each in reply.explanations if each.decision != "waits"]
    (explanation,) = decided
    assert explanation.decision == "start"
    assert "worker-a" in explanation.reason
    assert explanation.predicted_s > 0


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.ExplainRequest(model="nobody"), grpc.StatusCode.NOT_FOUND),
        (pb.ExplainRequest(request_id="r"), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ExplainRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_what_cannot_be_explained_is_refused(fleet, request_, code):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fleet.stub.Explain(request_, timeout=5)
    assert caught.value.code() is code
