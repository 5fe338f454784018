"""How the jobs of a replica leave it: moved to other workers, finished, handed back."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from gearfall.core.errors import DeadlineExceeded
from gearfall.core.generation.job import Priority
from gearfall.core.ids import JobId, ModelName
from services.worker.jobs.claim_loop import ClaimLoop
from services.worker.jobs.job_board import JobBoard
from services.worker.migration.evacuation import Departure, Evacuation
from services.worker.replicas.replica_start import within

SETTLE_TIMEOUT_S = 5.0
"""How long an emptied replica waits to hear of the jobs that have just left it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DrainOutcome:
    """What became of the jobs that ran when a drain began."""

    finished_jobs: int = 0
    lost_job_ids: tuple[JobId, ...] = ()
    departures: tuple[Departure, ...] = ()
    """Jobs that were offered to other workers."""


class Drain:
    """Empties one replica, once."""

    def __init__(
        self,
        model: ModelName,
        board: JobBoard,
        claims: ClaimLoop,
        *,
        evacuate: Callable[[ModelName], Evacuation] | None,
        has_engine: Callable[[], bool],
    ) -> None:
        """`evacuate` moves jobs elsewhere, None where there is no elsewhere."""
        self._model = model
        self._board = board
        self._claims = claims
        self._evacuate = evacuate
        self._has_engine = has_engine
        self._changed = asyncio.Event()
        self._yields_batch = False
        self._yielded: tuple[JobId, ...] = ()
        """Batch jobs that were handed back at the beginning."""

    def note_changed(self) -> None:
        """A job has come, ended or left."""
        self._changed.set()

    async def run(self, deadline_s: float, *, yields: bool) -> DrainOutcome:
        """Claim nothing more and move jobs to other workers; those that stay may finish until
        `deadline_s` from now, what is left then is handed back.

        `yields`: batch jobs are handed back at once with their tokens so far, for whoever has room.
        """
        running = self._board.occupied_slots(self._model)
        self._board.drop_incoming(self._model)
        self._yields_batch = yields
        self._yield_batch()
        departures = await self._empty(deadline_s)
        lost = (*self._yielded, *self._board.give_back(self._model))
        moved = sum(1 for each in departures if each.moved)
        extra = {"model": self._model, "moved_jobs": moved, "lost_jobs": len(lost)}
        _log.info("replica drained", extra=extra)
        return DrainOutcome(max(0, running - len(lost) - moved), lost, departures)

    async def _empty(self, deadline_s: float) -> tuple[Departure, ...]:
        """Return how jobs left, once nothing runs here or the deadline has come."""
        if self._evacuate is None or not self._has_engine():
            await self._claims.stop()
            await self._wait_quiet(deadline_s)
            return ()
        evacuation = self._evacuate(self._model)
        moving = asyncio.create_task(evacuation.run(deadline_s), name=f"evacuation-{self._model}")
        # A claim under way may still bring jobs.
        stopping = asyncio.create_task(self._claims.stop(), name=f"stop-claims-{self._model}")
        stopping.add_done_callback(lambda _: evacuation.wake())
        await stopping
        await self._wait_quiet(deadline_s)
        if self._board.occupied_slots(self._model) == 0:
            with contextlib.suppress(DeadlineExceeded):
                await within(SETTLE_TIMEOUT_S, evacuation.settled(), "the last move's end")
        # What was asked of a router is settled between it and the target.
        moving.cancel()
        await asyncio.wait({moving})
        if not moving.cancelled() and (error := moving.exception()):
            _log.error("evacuation failed", extra={"model": self._model}, exc_info=error)
        return tuple(evacuation.departures.values())

    async def _wait_quiet(self, deadline_s: float) -> None:
        """Return when nothing runs here, or at the deadline."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self._board.occupied_slots(self._model) > 0 and self._has_engine():
                    self._changed.clear()
                    self._yield_batch()  # one that was claimed just before may have begun to run
                    await self._changed.wait()

    def _yield_batch(self) -> None:
        if self._yields_batch:
            self._yielded += self._board.give_back(self._model, (Priority.BATCH,))
