"""What a worker takes over: entries of the dead, and its own that it does not know of."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from gearfall.core.errors import Unavailable
from gearfall.core.gears.claim_rule import ClaimRule
from gearfall.core.ids import ModelName
from gearfall.core.ports import QueuedJob
from gearfall.infra.queue.memory_queue import MemoryQueue
from services.worker.jobs.claim_loop import DOUBT_S, ClaimLoop
from services.worker.jobs.job_board import JobBoard
from tests.services.worker.fakes import MODEL, WORKER, Watched, job

DEAD = "worker-dead"


class Board(Watched):
    """Takes every job; each has a slot until it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.accepted: list[QueuedJob] = []
        self.running: set[str] = set()

    def occupied_slots(self, _: ModelName) -> int:
        return len(self.running)

    def displaceable_slots(self, _: ModelName) -> int:
        return 0

    def accept(self, queued: QueuedJob) -> None:
        self.accepted.append(queued)
        self.running.add(queued.entry_id)
        self.notify()


class Queue(MemoryQueue, Watched):
    """Says when it was asked for what others had."""

    def __init__(self) -> None:
        MemoryQueue.__init__(self)
        Watched.__init__(self)
        self.reclaims: list[frozenset[str]] = []
        self.during_reclaim: asyncio.Event | None = None
        """If there is one, a call is under way until it is set."""
        self.failures = 0
        """Calls still to fail."""
        self.has_lost_answers = False
        """Whether the answer of each claim that gets something is lost with the server."""

    async def claim(self, model: ModelName, consumer: str, **limits: Any) -> Sequence[QueuedJob]:
        if not self.has_lost_answers:
            return await super().claim(model, consumer, **limits)
        if await MemoryQueue(self.server).claim(model, consumer, **limits):
            self.server.stop()
            self.notify()
            raise Unavailable("the connection was lost")
        return ()

    async def reclaim(
        self, model: ModelName, consumer: str, *, alive: frozenset[str], max_jobs: int
    ) -> Sequence[QueuedJob]:
        if self.failures:
            self.failures -= 1
            raise Unavailable("not now")
        taken = await super().reclaim(model, consumer, alive=alive, max_jobs=max_jobs)
        self.reclaims.append(alive)
        self.notify()
        if self.during_reclaim is not None:
            await self.during_reclaim.wait()
        return taken


class Scene:
    def __init__(self, slots: int, rule: ClaimRule, doubt_s: float) -> None:
        self.queue, self.board = Queue(), Board()
        self.alive = {WORKER, DEAD}
        self.loop = ClaimLoop(
            MODEL,
            WORKER,
            slots,
            self.queue,
            cast("JobBoard", self.board),
            alive=lambda: frozenset(self.alive),
            block_s=0.01,
            doubt_s=doubt_s,
            rule=lambda: rule,
        )

    async def append(self, name: str) -> str:
        return await self.queue.append(job(name))

    async def claimed_by(self, consumer: str, name: str) -> str:
        """Append a job and have a consumer claim it."""
        entry_id = await self.append(name)
        await self.queue.claim(MODEL, consumer, max_jobs=1, block_s=0)
        return entry_id

    async def until_accepted(self, *names: str) -> None:
        await self.board.until(lambda: self.names() == list(names))

    def names(self) -> list[str]:
        return [queued.job.job_id for queued in self.board.accepted]

    async def finish(self, entry_id: str) -> None:
        await self.queue.acknowledge(MODEL, [entry_id])
        self.board.running.discard(entry_id)
        self.loop.wake()

    def restart(self) -> None:
        self.queue.server.stop()
        self.queue.server.start()


@asynccontextmanager
async def running(
    slots: int = 4, rule: ClaimRule | None = None, doubt_s: float = DOUBT_S
) -> AsyncIterator[Scene]:
    scene = Scene(slots, rule or ClaimRule(), doubt_s)
    scene.loop.start()
    scene.loop.open()
    try:
        yield scene
    finally:
        await scene.loop.stop()


async def test_what_the_dead_had_is_taken_over_once_they_are_gone():
    async with running() as scene:
        await scene.claimed_by(DEAD, "orphan")
        await scene.append("new")
        await scene.until_accepted("new")
        scene.alive.remove(DEAD)
        scene.loop.request_reclaim()
        await scene.until_accepted("new", "orphan")


async def test_who_dies_while_others_are_taken_over_is_not_forgotten():
    async with running() as scene:
        scene.queue.during_reclaim = under_way = asyncio.Event()
        before = len(scene.queue.reclaims)
        await scene.claimed_by(DEAD, "orphan")
        scene.loop.request_reclaim()
        await scene.append("new")
        await scene.queue.until(lambda: len(scene.queue.reclaims) > before)
        scene.alive.remove(DEAD)
        scene.loop.request_reclaim()
        under_way.set()
        await scene.board.until(lambda: set(scene.names()) == {"new", "orphan"})


@pytest.mark.parametrize("rule", [ClaimRule(), ClaimRule(share=0.5)], ids=["alone", "shared"])
async def test_a_full_worker_settles_again_what_a_restarted_server_forgot(rule: Any):
    """None of its calls breaks off, and nothing new arrives afterwards."""
    async with running(slots=1, rule=rule) as scene:
        done = await scene.append("done")
        await scene.until_accepted("done")
        last = await scene.append("last")
        scene.queue.server.forget_from_now()
        await scene.finish(done)
        await scene.until_accepted("done", "last")
        scene.restart()
        assert await scene.queue.holder(MODEL, done) == WORKER
        await scene.finish(last)
        await scene.until_accepted("done", "last", "done")


async def test_what_was_taken_over_before_the_server_forgot_is_taken_over_again():
    async with running() as scene:
        scene.alive.remove(DEAD)
        orphan = await scene.claimed_by(DEAD, "orphan")
        scene.queue.server.forget_from_now()
        scene.loop.request_reclaim()
        await scene.until_accepted("orphan")
        await scene.finish(orphan)
        scene.restart()
        assert await scene.queue.holder(MODEL, orphan) == DEAD
        await scene.until_accepted("orphan", "orphan")


@pytest.mark.parametrize("doubt_s", [DOUBT_S, 0.0], ids=["in doubt", "later"])
async def test_a_take_over_that_failed_is_tried_again(doubt_s: float):
    async with running(doubt_s=doubt_s) as scene:
        scene.alive.remove(DEAD)
        scene.queue.failures = 1
        await scene.claimed_by(DEAD, "orphan")
        scene.loop.request_reclaim()
        await scene.until_accepted("orphan")
        assert scene.queue.failures == 0


async def test_what_a_broken_claim_was_given_is_accepted_though_the_replica_has_left():
    """The server is out of reach while the loop stops, and for a while after."""
    async with running() as scene:
        scene.queue.has_lost_answers = True
        entry = await scene.append("unheard of")
        await scene.queue.until(lambda: not scene.queue.server.is_up)
        await scene.loop.stop()
        settling = asyncio.create_task(scene.loop.settle())
        scene.queue.server.start()
        assert await scene.queue.holder(MODEL, entry) == WORKER
        await scene.until_accepted("unheard of")
        settling.cancel()


async def test_a_loop_that_stopped_without_a_doubt_asks_for_nothing():
    async with running() as scene:
        await scene.append("done")
        await scene.until_accepted("done")
        await scene.loop.stop()
        scene.queue.reclaims.clear()
        await scene.loop.settle()
        assert not scene.queue.reclaims
