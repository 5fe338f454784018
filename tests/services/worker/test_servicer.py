"""The worker's gRPC face over a real channel."""

from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc
import pytest

from gearfall.infra.net.convert import job_to_pb
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_server import start_server
from gearfall.pb import worker_pb2 as pb
from gearfall.pb.worker_pb2_grpc import WorkerStub, add_WorkerServicer_to_server
from services.worker.service import WorkerService
from services.worker.servicer import WorkerServicer
from tests.services.worker.fakes import MODEL, job, run_of
from tests.services.worker.worker_site import Site


@dataclass
class Door:
    """A site and a stub to its worker."""

    site: Site
    stub: WorkerStub


@pytest.fixture
async def door():
    async with AsyncExitStack() as stack:
        opened = await Site(stack).open()
        servicer = WorkerServicer(WorkerService(opened.host), opened.desk)
        server = await start_server(
            "127.0.0.1:0",
            lambda s: add_WorkerServicer_to_server(servicer, s),
            ("gearfall.v1.Worker",),
        )
        stack.push_async_callback(server.stop, 0.0)
        channel = open_channel(server.address)
        stack.push_async_callback(channel.close)
        yield Door(opened, WorkerStub(channel))


async def test_status_counts_the_jobs_that_run_now(door):
    engine = await door.site.ready()
    await door.site.running(engine)
    status = await door.stub.GetStatus(pb.WorkerStatusRequest(), timeout=5)
    (replica,) = status.replicas
    assert (replica.model, replica.running_jobs, replica.slots) == (MODEL, 1, 2)
    assert status.memory_used_bytes == 64


async def test_drain_says_what_it_handed_back(door):
    engine = await door.site.ready()
    await door.site.running(engine)
    reply = await door.stub.Drain(pb.DrainRequest(deadline_s=0.0), timeout=10)
    assert list(reply.lost_job_ids) == ["job-1"]
    assert engine.is_gone


async def test_a_drain_without_end_is_refused(door):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.Drain(pb.DrainRequest(deadline_s=-1.0), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_job_that_does_not_run_here_is_not_moved(door):
    request = pb.MigrateJobRequest(job_id="job-1", target_address="127.0.0.1:1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.MigrateJob(request, timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_job_stays_when_its_target_cannot_be_reached(door):
    engine = await door.site.ready()
    a_job = await door.site.running(engine)
    request = pb.MigrateJobRequest(job_id="job-1", epoch=1, target_address="127.0.0.1:1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.MigrateJob(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    engine.step(run_of(a_job, 0))
    await door.site.router.until(lambda: door.site.router.steps)


async def test_a_migration_without_an_offer_is_refused(door):
    call = door.stub.ReceiveMigration(timeout=5)
    await call.write(pb.MigrationFrame(freeze=pb.MigrationFreeze()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("model", "digest", "arithmetic", "reason"),
    [
        ("other", "d" * 32, "exact", "not hosted"),
        (MODEL, "e" * 32, "exact", "is the checkpoint d"),
        (MODEL, "d" * 32, "bf16", "by exact arithmetic here, not by bf16"),
        (MODEL, "d" * 32, "", "by exact arithmetic here, not by its device's"),
    ],
)
async def test_a_job_of_another_model_is_refused(door, model, digest, arithmetic, reason):
    await door.site.ready()
    call = door.stub.ReceiveMigration(timeout=5)
    offered = job_to_pb(job("job-7", model=model, address=door.site.router.address))
    offer = pb.MigrationOffer(job=offered, model_digest=digest, arithmetic=arithmetic)
    await call.write(pb.MigrationFrame(offer=offer))
    reply = await call.read()
    assert isinstance(reply, pb.MigrationReply)
    assert reason in reply.refused.reason
    assert door.site.board.occupied_slots(MODEL) == 0
