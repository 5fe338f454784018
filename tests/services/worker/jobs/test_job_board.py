"""Jobs between a queue in memory, a scripted engine and a router over real gRPC."""

from contextlib import AsyncExitStack

import pytest

from gearfall.core.generation.job import Priority
from gearfall.core.ids import RouterId
from gearfall.infra.queue.memory_queue import MemoryQueue
from services.worker.jobs.job_board import JobBoard
from services.worker.jobs.push_stream import CLAIM_WAIT_S, PushStream
from services.worker.jobs.settlement import Settlement
from tests.services.worker.fakes import (
    FINISH,
    MODEL,
    NODE,
    WORKER,
    FakeEngine,
    FakeRouter,
    Watched,
    job,
    run_of,
    step_of,
)


class Bench:
    """A board with one engine and one router."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack
        self.queue = MemoryQueue()
        self.settlement = Settlement(self.queue, retry_s=0.01)
        self.live_routers: set[str] = set()
        self.engine = FakeEngine(7)
        self.reconnect_for_s = 5.0

    async def open(self) -> "Bench":
        self.settlement.start()
        self.board = JobBoard(
            self.settlement, self._open_stream, lambda router: router in self.live_routers
        )
        self.stack.push_async_callback(self.settlement.stop)
        self.stack.push_async_callback(self.board.stop, timeout_s=0.0)
        self.board.attach_engine(MODEL, self.engine)
        self.router = await self.new_router()
        return self

    async def new_router(self, name="router-a", listen="127.0.0.1:0") -> FakeRouter:
        self.live_routers.add(name)
        return await FakeRouter(RouterId(name)).start(self.stack, listen)

    def _open_stream(self, address, listener) -> PushStream:
        return PushStream(address, WORKER, NODE, listener, reconnect_for_s=self.reconnect_for_s)

    async def claim(self, name="job-1", **fields):
        """Append a job for the router, claim it and hand it to the board."""
        a_job = job(name, **{"address": self.router.address, **fields})
        await self.queue.append(a_job)
        for queued in await self.queue.claim(MODEL, WORKER, max_jobs=9, block_s=0):
            self.board.accept(queued)
        return a_job

    async def running(self, name="job-1", **fields):
        a_job = await self.claim(name, **fields)
        key = (a_job.job_id, a_job.epoch)
        await self.engine.until(lambda: key in self.engine.submitted)
        await self.router.until(lambda: key in self.router.claims)
        return a_job

    async def all_settled(self) -> bool:
        await self.settlement.wait_empty()
        depth = await self.queue.depth(MODEL)
        return depth.claimed == depth.waiting == 0

    def push(self, *runs) -> None:
        self.board.push_step(step_of(*runs))


@pytest.fixture
async def bench():
    async with AsyncExitStack() as stack:
        opened = await Bench(stack).open()
        yield opened
        opened.board.check()


async def test_hello_claim_steps_finished_acknowledged_in_this_order(bench):
    a_job = await bench.running()
    kinds = [push.WhichOneof("push") for push in bench.router.heard]
    assert kinds == ["hello", "claim"]
    assert bench.router.heard[0].hello.worker_id == WORKER
    bench.push(run_of(a_job, 0))
    await bench.router.until(lambda: len(bench.router.steps) == 1)
    bench.push(run_of(a_job, 1, finish=FINISH))
    await bench.router.until(lambda: len(bench.router.steps) == 2)
    assert bench.router.steps == [[("job-1", 0)], [("job-1", 1)]]
    assert (await bench.queue.depth(MODEL)).claimed == 1
    assert bench.board.occupied_slots(MODEL) == 0
    settled = watch_end(bench)
    bench.router.reply_finished(a_job)
    await settled.until(lambda: settled.count > 0)
    assert await bench.all_settled()


async def test_a_claim_comes_with_tokens_that_may_wait_and_come_soon(bench):
    await bench.running("job-0")
    a_job = await bench.claim("job-1", gather_s=0.02)
    bench.push(run_of(a_job, 0, finish=FINISH))
    await bench.router.until(lambda: bench.router.steps)
    (*_, push) = bench.router.heard
    assert [(each.job_id, each.epoch) for each in push.step.claims] == [("job-1", 1)]
    assert push.step.claims[0].held_s > 0
    assert bench.router.claims == [("job-0", 1), ("job-1", 1)], "each is told once"


async def test_a_claim_waits_for_no_tokens_that_take_longer(bench):
    await bench.running("job-0")
    await bench.running("job-1", gather_s=0.02)
    assert [push.WhichOneof("push") for push in bench.router.heard] == ["hello", "claim", "claim"]
    assert bench.router.heard[-1].claim.held_s >= CLAIM_WAIT_S


async def test_no_message_overtakes_a_claim_that_waits(bench):
    await bench.running("job-0")
    await bench.claim("job-1", gather_s=0.02)
    bench.board.give_back(MODEL)
    await bench.router.until(lambda: len(bench.router.lost) == 2)
    kinds = [push.WhichOneof("push") for push in bench.router.heard]
    assert kinds == ["hello", "claim", "claim", "lost", "lost"]


def watch_end(bench):
    """Count the changes of the model's claims from now on."""
    counter = Counter()
    bench.board.watch(MODEL, counter.add)
    return counter


class Counter(Watched):
    count = 0

    def add(self) -> None:
        self.count += 1
        self.notify()


async def test_one_message_for_each_step_and_router(bench):
    one, two = await bench.running("job-1"), await bench.running("job-2")
    other_router = await bench.new_router("router-b")
    three = await bench.claim("job-3", address=other_router.address, router_id="router-b")
    await other_router.until(lambda: ("job-3", 1) in other_router.claims)
    bench.push(run_of(one, 0), run_of(two, 0), run_of(three, 0))
    await bench.router.until(lambda: bench.router.steps)
    await other_router.until(lambda: other_router.steps)
    assert bench.router.steps == [[("job-1", 0), ("job-2", 0)]]
    assert other_router.steps == [[("job-3", 0)]]
    assert bench.router.connections == 1


async def test_steps_that_wait_for_the_stream_share_a_message(bench):
    a_job = await bench.running()
    bench.push(run_of(a_job, 0))
    bench.push(run_of(a_job, 1))
    await bench.router.until(lambda: bench.router.steps)
    assert bench.router.steps == [[("job-1", 0)]]
    (joined,) = bench.router.heard[-1].step.runs
    assert list(joined.token_ids) == [7, 7]


async def test_stop_cancels_in_the_engine_and_acknowledges(bench):
    a_job = await bench.running()
    bench.router.reply_stop(a_job)
    await bench.engine.until(lambda: bench.engine.cancelled == [("job-1", 1)])
    assert await bench.all_settled()
    bench.push(run_of(a_job, 0))
    other = await bench.running("job-2")
    bench.push(run_of(other, 0))
    await bench.router.until(lambda: bench.router.steps)
    assert bench.router.steps == [[("job-2", 0)]]


async def test_a_dead_engines_jobs_are_lost_and_acknowledged_on_stop(bench):
    a_job = await bench.running()
    bench.board.detach_engine(MODEL)
    await bench.router.until(lambda: bench.router.lost == [("job-1", 1)])
    assert (await bench.queue.depth(MODEL)).claimed == 1
    settled = watch_end(bench)
    bench.router.reply_stop(a_job)
    await settled.until(lambda: settled.count > 0)
    assert await bench.all_settled()


async def test_a_job_that_comes_without_an_engine_is_claimed_and_lost(bench):
    bench.board.detach_engine(MODEL)
    await bench.claim()
    await bench.router.until(lambda: bench.router.lost == [("job-1", 1)])
    assert bench.router.claims == [("job-1", 1)]


async def test_a_broken_stream_cancels_reconnects_and_claims_again(bench):
    a_job = await bench.running()
    bench.push(run_of(a_job, 0))
    bench.router.hang_up()
    await bench.engine.until(lambda: bench.engine.submitted.count(("job-1", 1)) == 2)
    assert bench.engine.cancelled == [("job-1", 1)]
    await bench.router.until(lambda: bench.router.claims.count(("job-1", 1)) == 2)
    assert (await bench.queue.depth(MODEL)).claimed == 1
    bench.router.reply_stop(a_job)
    await bench.engine.until(lambda: len(bench.engine.cancelled) == 2)
    assert await bench.all_settled()


async def test_a_router_that_does_not_come_back_ends_its_jobs(bench):
    bench.reconnect_for_s = 0.2
    await bench.running()
    await bench.router.stop()
    bench.live_routers.clear()
    settled = watch_end(bench)
    await settled.until(lambda: bench.board.occupied_slots(MODEL) == 0)
    assert await bench.all_settled()
    late = await bench.claim("job-2")
    assert late.job_id not in bench.engine.submitted
    assert bench.board.occupied_slots(MODEL) == 0
    assert await bench.all_settled()


async def test_another_router_at_the_same_address_means_that_the_first_is_dead(bench):
    await bench.running()
    address = bench.router.address
    await bench.router.stop()
    bench.live_routers.clear()
    heir = await bench.new_router("router-b", listen=address)
    settled = watch_end(bench)
    await settled.until(lambda: bench.board.occupied_slots(MODEL) == 0)
    assert await bench.all_settled()
    bench.router = heir
    await bench.running("job-2", router_id="router-b")
    await bench.claim("job-3", router_id="router-a")
    assert ("job-3", 1) not in bench.engine.submitted
    assert bench.board.occupied_slots(MODEL) == 1


async def test_a_silent_router_is_no_router(bench):
    bench.router.is_silent = True
    await bench.claim()
    await bench.router.until(lambda: bench.router.connections == 1)
    assert bench.engine.submitted == []
    bench.router.is_silent = False
    bench.router.hang_up()
    await bench.engine.until(lambda: bench.engine.submitted == [("job-1", 1)])


async def test_batch_jobs_are_given_back_alone_and_once(bench):
    await bench.running("chat")
    await bench.running("batch", priority=Priority.BATCH)
    heard = []
    bench.board.watch(MODEL, lambda: heard.append(1))
    assert bench.board.give_back(MODEL, (Priority.BATCH,)) == ("batch",)
    told = len(heard)
    assert bench.board.give_back(MODEL, (Priority.BATCH,)) == ()
    assert len(heard) == told, "nothing changed"
    assert [claim.job.job_id for claim in bench.board.running(MODEL)] == ["chat"]


async def test_give_back_cancels_and_says_lost(bench):
    await bench.running("job-1")
    finishing = await bench.running("job-2")
    bench.push(run_of(finishing, 0, finish=FINISH))
    assert bench.board.give_back(MODEL) == ("job-1",)
    await bench.router.until(lambda: bench.router.lost == [("job-1", 1)])
    assert bench.engine.cancelled == [("job-1", 1)]


async def test_a_queue_outage_delays_the_acknowledgement_only(bench):
    a_job = await bench.running()
    bench.queue.server.stop()
    bench.router.reply_stop(a_job)
    await bench.engine.until(lambda: bench.engine.cancelled)
    bench.queue.server.start()
    assert await bench.all_settled()
