"""A handover at the router's door: two push streams over real gRPC, one job that moves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.infra.net.convert import token_run_to_pb
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.pb import router_pb2 as pb
from gearfall.pb.router_pb2_grpc import TokenSinkStub
from tests.services.router.char_models import EOS_ID, NODE, ids_of
from tests.services.router.rig import running_rig

MODEL = "small"
TEXT = "moved on"


class Sender:
    """A worker's push stream, written and read by hand."""

    def __init__(self, call) -> None:
        self._call = call

    async def push(self, **fields) -> None:
        await self._call.write(pb.WorkerPush(**fields))

    async def hear(self) -> pb.RouterReply:
        reply = await self._call.read()
        assert isinstance(reply, pb.RouterReply)
        return reply

    async def tokens(self, job_id, epoch, start, end, *, finish=None) -> None:
        ids = (*ids_of(TEXT), EOS_ID)[start:end]
        numbers = tuple(-0.1 for _ in ids)
        run = TokenRun(job_id, epoch, start, ids, numbers, numbers, finish=finish)
        await self.push(step=pb.StepTokens(runs=[token_run_to_pb(run)]))

    async def hand_over(self, job_id, epoch, next_index, target) -> None:
        handover = pb.JobHandover(
            job_id=job_id, epoch=epoch, next_index=next_index, target_worker_id=target
        )
        await self.push(handover=handover)


class Site:
    def __init__(self, rig, stack) -> None:
        self.rig = rig
        self._stack = stack

    async def open(self, worker_id: str) -> Sender:
        channel = await self._stack.enter_async_context(open_channel(self.rig.router.grpc_address))
        sender = Sender(TokenSinkStub(channel).Push())
        await sender.push(hello=pb.WorkerHello(worker_id=worker_id, node_id=NODE))
        assert (await sender.hear()).WhichOneof("reply") == "hello"
        return sender

    async def running(self, source: Sender):
        """A request whose job `source` has claimed and brought three tokens of."""
        self.asked = asyncio.create_task(self.rig.ask(MODEL))
        await self.rig.until(lambda: len(self.rig.router.jobs) == 1)
        (job_id,) = self.rig.router.jobs._jobs
        await source.push(claim=pb.JobClaim(job_id=job_id, epoch=1, model=MODEL))
        await source.tokens(job_id, 1, 0, 3)
        return job_id


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running_rig() as rig, contextlib.AsyncExitStack() as stack:
        await rig.add_model(MODEL)
        yield Site(rig, stack)


async def end_of(site, sender, job_id, epoch, start):
    await sender.tokens(job_id, epoch, start, 99, finish=FinishReason.STOP)
    (finished,) = (await sender.hear()).finished.jobs
    assert (finished.job_id, finished.epoch) == (job_id, epoch)
    outcome = await site.asked
    assert outcome.text() == TEXT
    return outcome


async def test_the_target_is_granted_the_job_and_the_source_is_stopped(site):
    source, target = await site.open("worker-s"), await site.open("worker-t")
    job_id = await site.running(source)
    await source.hand_over(job_id, 1, 3, "worker-t")
    granted, stop = (await target.hear()).granted, (await source.hear()).stop
    assert (granted.job_id, granted.epoch, granted.next_index) == (job_id, 2, 3)
    assert (stop.epoch, stop.handed_over) == (1, True)
    site.rig.router.jobs.check()
    await source.tokens(job_id, 1, 3, 4)
    stop = (await source.hear()).stop
    assert (stop.epoch, stop.handed_over) == (1, False)
    outcome = await end_of(site, target, job_id, 2, 3)
    assert outcome.ends[0].stages[0].epochs == 2


@pytest.mark.parametrize(
    ("next_index", "target_id", "reason"),
    [(2, "worker-t", "ends at 3"), (3, "worker-x", "no stream"), (3, "worker-s", "of its own")],
)
async def test_a_handover_that_does_not_fit_leaves_the_job_where_it_is(
    site, next_index, target_id, reason
):
    source, _ = await site.open("worker-s"), await site.open("worker-t")
    job_id = await site.running(source)
    await source.hand_over(job_id, 1, next_index, target_id)
    kept = (await source.hear()).kept
    assert (kept.job_id, kept.epoch) == (job_id, 1)
    assert reason in kept.reason
    await end_of(site, source, job_id, 1, 3)


async def test_who_is_not_the_owner_hands_nothing_over(site):
    source, target = await site.open("worker-s"), await site.open("worker-t")
    job_id = await site.running(source)
    await target.hand_over(job_id, 1, 3, "worker-t")
    assert (await target.hear()).stop.reason == "not the owner"
    await target.hand_over("job-x", 1, 3, "worker-s")
    assert (await target.hear()).stop.reason == "no such job here"
    await end_of(site, source, job_id, 1, 3)


async def test_a_granted_job_whose_target_cannot_run_it_is_put_back(site):
    source, target = await site.open("worker-s"), await site.open("worker-t")
    job_id = await site.running(source)
    await source.hand_over(job_id, 1, 3, "worker-t")
    assert (await target.hear()).granted.epoch == 2
    await target.push(lost=pb.JobLost(job_id=job_id, epoch=2, reason="dropped"))
    assert (await target.hear()).stop.epoch == 2
    await source.push(claim=pb.JobClaim(job_id=job_id, epoch=3, model=MODEL))
    assert (await source.hear()).stop.handed_over
    await end_of(site, source, job_id, 3, 3)


async def test_a_target_that_dies_after_the_grant_costs_its_job_an_epoch(site):
    source = await site.open("worker-s")
    async with contextlib.AsyncExitStack() as stack:
        target = await Site(site.rig, stack).open("worker-t")
        job_id = await site.running(source)
        await source.hand_over(job_id, 1, 3, "worker-t")
        assert (await target.hear()).granted.epoch == 2
        assert (await source.hear()).stop.handed_over
    log = site.rig.router.jobs._jobs[job_id].log
    await site.rig.until(lambda: log.epoch == 3)
    await source.push(claim=pb.JobClaim(job_id=job_id, epoch=3, model=MODEL))
    await end_of(site, source, job_id, 3, 3)
