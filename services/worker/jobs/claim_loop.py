"""Takes jobs of one model from its queue, never more than the replica has room for."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Sequence

from gearfall.core.errors import GearfallError
from gearfall.core.gears.claim_rule import ClaimRule
from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.ports import JobQueue, QueuedJob
from gearfall.infra.failpoints import failpoint, failpoint_async
from services.worker.jobs.job_board import JobBoard
from services.worker.jobs.turns import Turns

RETRY_S = 0.5
HOLD_S = 5.0
"""Longest that jobs claimed just before the engine died wait for the next engine."""
DOUBT_S = 3.0
"""How long after a failed call, or a restart of the queue's server, entries may still turn up that
were handed to this worker without its knowledge."""

_log = logging.getLogger(__name__)


class ClaimLoop:
    """Claims for one replica while it is open, until it is told to stop.

    It claims as many jobs as there are free slots. Where none is free, it claims interactive jobs
    alone, up to the number of batch jobs whose slots the engine will give them. When it claims, the
    gears in force say (`turns.py`).

    A claim that blocks is never cancelled: entries that the server handed out meanwhile would be
    nobody's while this worker lives.
    """

    def __init__(
        self,
        model: ModelName,
        worker_id: WorkerId,
        slots: int,
        queue: JobQueue,
        board: JobBoard,
        *,
        alive: Callable[[], frozenset[str]],
        block_s: float,
        hold_s: float = HOLD_S,
        doubt_s: float = DOUBT_S,
        rule: Callable[[], ClaimRule] = ClaimRule,
    ) -> None:
        """`alive`: workers whose claims are their own; others' are taken over. `rule`: in force."""
        self._model = model
        self._worker_id = worker_id
        self._slots = slots
        self._queue = queue
        self._board = board
        self._alive = alive
        self._block_s = block_s
        self._hold_s = hold_s
        self._doubt_s = doubt_s
        self._turns = Turns(model, queue, rule, block_s)
        self._waiters: list[tuple[Callable[[], bool], asyncio.Event]] = []
        """What is waited for, and who hears of it."""
        self._is_open = False
        self._is_stopping = False
        self._is_reclaim_due = False
        self._known_restarts = queue.restarts
        self._doubt_until_s = -math.inf
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin in the background, closed."""
        for name, find_room, take in (
            ("claims", self._free_slots, self._take),
            ("interactive-claims", self._displaceable_slots, self._take_interactive),
        ):
            run = self._run(find_room, take)
            self._tasks.append(asyncio.create_task(run, name=f"{name}-{self._model}"))

    def open(self) -> None:
        """The engine serves: claim, and first take over what dead workers had claimed."""
        self._is_open = True
        self.request_reclaim()

    def close(self) -> None:
        """The engine is gone: claim nothing before `open`."""
        self._is_open = False

    def wake(self) -> None:
        """Look again: slots may have become free."""
        for holds, happened in self._waiters:
            if holds():
                happened.set()

    def request_reclaim(self) -> None:
        """Take over what dead workers had claimed, as soon as there is room."""
        self._is_reclaim_due = True
        self.wake()

    async def stop(self) -> None:
        """Claim nothing more; return when the claim under way has ended too. Idempotent."""
        self._is_stopping = True
        self.wake()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def settle(self) -> None:
        """After `stop`: have what broken calls may have brought handed back, once it can be seen.

        Nobody else takes what a worker that lives on holds. Returns when no doubt is left.
        """
        while asyncio.get_running_loop().time() < self._doubt_until_s:
            try:
                jobs = await self._queue.reclaim(
                    self._model,
                    self._worker_id,
                    alive=self._alive() | {self._worker_id},
                    max_jobs=self._slots,
                )
            except GearfallError:
                self._doubt()
                jobs = ()
            for queued in jobs:
                self._board.accept(queued)
            await asyncio.sleep(RETRY_S)

    async def _run(
        self,
        find_room: Callable[[], int],
        take: Callable[[int], Awaitable[Sequence[QueuedJob]]],
    ) -> None:
        while (room := await self._wait_room(find_room)) > 0:
            try:
                jobs = await take(room)
            except GearfallError as error:
                self._doubt()
                _log.warning("cannot claim", extra={"model": self._model, "error": error.message})
                await self._wait_for(lambda: self._is_stopping, RETRY_S)
                continue
            if jobs:
                await self._wait_for(lambda: self._is_open or self._is_stopping, self._hold_s)
            for queued in jobs:
                failpoint("worker.accept", job_id=queued.job.job_id, model=self._model)
                self._board.accept(queued)

    async def _wait_room(self, find_room: Callable[[], int]) -> int:
        """Return for how many jobs there is room once there is any; 0 when stopping."""
        await self._wait_for(lambda: self._is_stopping or (self._is_open and find_room() > 0), None)
        return 0 if self._is_stopping else find_room()

    def _free_slots(self) -> int:
        return self._slots - self._board.occupied_slots(self._model)

    def _displaceable_slots(self) -> int:
        """Slots that interactive jobs can have though none is free."""
        overdrawn = -self._free_slots()
        if overdrawn < 0:
            return 0
        return min(self._board.displaceable_slots(self._model), self._slots - overdrawn)

    async def _take_interactive(self, room: int) -> Sequence[QueuedJob]:
        return await self._queue.claim(
            self._model,
            self._worker_id,
            max_jobs=room,
            max_batch_jobs=0,
            block_s=self._block_s,
        )

    async def _take(self, free: int) -> Sequence[QueuedJob]:
        await failpoint_async("worker.claim", model=self._model)
        if self._is_takeover_due() and (taken := await self._take_over(free)):
            return taken
        is_idle = self._board.occupied_slots(self._model) == 0
        turn = await self._turns.next(free, is_idle=is_idle, pause=self._pause)
        if turn is None:
            return ()
        jobs = await self._queue.claim(
            self._model, self._worker_id, max_jobs=turn.max_jobs, block_s=turn.block_s
        )
        self._turns.note_taken(len(jobs))
        return jobs

    def _is_takeover_due(self) -> bool:
        """Whether entries may lie in the queue that nobody alive knows to be its own."""
        if self._queue.restarts != self._known_restarts:
            self._known_restarts = self._queue.restarts
            self._doubt()
        return self._is_reclaim_due or asyncio.get_running_loop().time() < self._doubt_until_s

    def _doubt(self) -> None:
        self._doubt_until_s = asyncio.get_running_loop().time() + self._doubt_s

    async def _take_over(self, free: int) -> Sequence[QueuedJob]:
        """Return what dead workers had claimed; it stays due until nothing is left of that."""
        self._is_reclaim_due = False  # another worker may die while the call is under way
        alive = self._alive() | {self._worker_id}
        try:
            taken = await self._queue.reclaim(
                self._model, self._worker_id, alive=alive, max_jobs=free
            )
        except BaseException:
            self._is_reclaim_due = True
            raise
        if taken:
            self._is_reclaim_due = True
            _log.info("reclaimed", extra={"model": self._model, "jobs": len(taken)})
        return taken

    async def _pause(self, seconds: float) -> None:
        await self._wait_for(lambda: self._is_stopping, seconds)

    async def _wait_for(self, holds: Callable[[], bool], seconds: float | None) -> None:
        """Return when it holds, or after so many seconds."""
        if holds():
            return
        happened = asyncio.Event()
        self._waiters.append((holds, happened))
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while not holds():
                        happened.clear()
                        await happened.wait()
        finally:
            self._waiters = [each for each in self._waiters if each[1] is not happened]
