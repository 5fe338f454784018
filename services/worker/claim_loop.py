"""Takes jobs of one model from its queue, never more than the replica has room for."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from gearfall.core.errors import GearfallError
from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.ports import JobQueue, QueuedJob
from services.worker.job_board import JobBoard

BLOCK_S = 0.5
"""Longest a claim blocks: so soon a freed slot, a dead worker's jobs or a drain are noticed."""
RETRY_S = 0.5

_log = logging.getLogger(__name__)


class ClaimLoop:
    """Claims for one ready replica until it is told to stop.

    A claim that blocks is never cancelled: entries that the server handed out would be lost to
    everybody while this worker lives.
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
    ) -> None:
        """`alive`: workers whose claims are their own; others' are taken over."""
        self._model = model
        self._worker_id = worker_id
        self._slots = slots
        self._queue = queue
        self._board = board
        self._alive = alive
        self._wake = asyncio.Event()
        self._is_reclaim_due = True
        self._is_stopping = False

    def wake(self) -> None:
        """Look again: slots may have become free."""
        self._wake.set()

    def request_reclaim(self) -> None:
        """Take over what dead workers had claimed, as soon as there is room."""
        self._is_reclaim_due = True
        self._wake.set()

    def stop(self) -> None:
        """Claim nothing more; `run` returns after the claim under way."""
        self._is_stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Claim until `stop`."""
        while (free := await self._wait_room()) > 0:
            try:
                jobs = await self._take(free)
            except GearfallError as error:
                _log.warning("cannot claim", extra={"model": self._model, "error": error.message})
                await self._pause(RETRY_S)
                continue
            for queued in jobs:
                self._board.accept(queued)

    async def _wait_room(self) -> int:
        """Return the number of free slots once there are any; 0 when stopping."""
        while not self._is_stopping:
            self._wake.clear()
            free = self._slots - self._board.occupied_slots(self._model)
            if free > 0:
                return free
            await self._wake.wait()
        return 0

    async def _take(self, free: int) -> Sequence[QueuedJob]:
        if self._is_reclaim_due:
            self._is_reclaim_due = False
            taken = await self._reclaim(free)
            if taken:
                self._is_reclaim_due = True
                return taken
        return await self._queue.claim(self._model, self._worker_id, max_jobs=free, block_s=BLOCK_S)

    async def _reclaim(self, free: int) -> Sequence[QueuedJob]:
        alive = self._alive() | {self._worker_id}
        try:
            taken = await self._queue.reclaim(
                self._model, self._worker_id, alive=alive, max_jobs=free
            )
        except GearfallError:
            self._is_reclaim_due = True
            raise
        if taken:
            _log.info("reclaimed", extra={"model": self._model, "jobs": len(taken)})
        return taken

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._is_stopping:
                    self._wake.clear()
                    await self._wake.wait()
