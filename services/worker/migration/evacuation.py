"""Moves the running jobs of one model off this worker while it drains, most valuable first."""

import asyncio
import logging
from collections import Counter, defaultdict
from contextlib import aclosing
from dataclasses import dataclass

from gearfall.core.errors import GearfallError, NotFound
from gearfall.core.ids import JobId, ModelName, WorkerId
from gearfall.infra.state.cluster import Cluster
from services.worker.migration.call import Moved
from services.worker.migration.desk import MigrationDesk
from services.worker.migration.drain_plan import Leaving, by_value, choose_room, rooms_for

HURRY = 0.5
"""Part of the time left in which a job is to be moved: another may have to follow."""
AT_ONCE = 4
"""Jobs of one model that move at the same time: more would only slow each other down."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Departure:
    """How the attempt to move one job ended."""

    job_id: JobId
    target_id: WorkerId
    moved: Moved | None
    """None when it stayed."""
    error: str = ""


class Evacuation:
    """One drain of one model. What came of it stands in `departures`, also when it is cancelled."""

    def __init__(
        self, cluster: Cluster, desk: MigrationDesk, worker_id: WorkerId, model: ModelName
    ) -> None:
        self._cluster = cluster
        self._desk = desk
        self._worker_id = worker_id
        self._model = model
        self._wake = asyncio.Event()
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._taken: Counter[WorkerId] = Counter()
        self._attempts: defaultdict[JobId, Counter[WorkerId]] = defaultdict(Counter)
        self._under_way: set[JobId] = set()
        self._settled = asyncio.Event()
        self._settled.set()
        self._ends_s = 0.0
        self.departures: dict[JobId, Departure] = {}

    async def run(self, deadline_s: float) -> None:
        """Move what can be moved, again whenever workers or replicas change, until cancelled.

        `deadline_s`: seconds from now until that happens.
        """
        self._ends_s = asyncio.get_running_loop().time() + deadline_s
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(), name="evacuation-watch")
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._move_all()

    async def settled(self) -> None:
        """Return when no job is on its way: one that has left here is not heard of at once."""
        await self._settled.wait()

    def wake(self) -> None:
        """Look again: more jobs may run here."""
        self._wake.set()

    async def _watch(self) -> None:
        async with aclosing(self._cluster.changes()) as changes:
            async for kinds in changes:
                if kinds & {"replicas", "workers"}:
                    self._wake.set()

    def _leaving(self) -> list[Leaving]:
        return by_value(
            Leaving(
                claim.job.job_id,
                claim.job.epoch,
                claim.job.priority,
                len(claim.job.prompt_token_ids) + claim.next_index,
            )
            for claim in self._desk.running()
            if claim.job.model == self._model
        )

    async def _move_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for job in self._leaving():
                tasks.create_task(self._move(job))

    async def _move(self, job: Leaving) -> None:
        async with self._limit:
            is_here = True
            while is_here and (job.job_id not in self._moved()):
                view = self._cluster.view
                rooms = rooms_for(self._model, self._worker_id, view.replicas, view.workers)
                room = choose_room(rooms, self._taken, self._attempts[job.job_id])
                if room is None:
                    return
                is_here = await self._try(job, room.worker_id, room.address)

    async def _try(self, job: Leaving, target: WorkerId, address: str) -> bool:
        """Offer a job to a worker; return whether it is still here."""
        self._attempts[job.job_id][target] += 1
        self._taken[target] += 1
        self._under_way.add(job.job_id)
        self._settled.clear()
        try:
            left_s = max(0.0, self._ends_s - asyncio.get_running_loop().time())
            moved = await self._desk.move(job.job_id, job.epoch, address, within_s=HURRY * left_s)
        except GearfallError as error:
            self._taken[target] -= 1
            self.departures[job.job_id] = Departure(job.job_id, target, None, error.message)
            _log.info("job stays", extra={"job_id": job.job_id, "reason": error.message})
            return not isinstance(error, NotFound)
        else:
            self.departures[job.job_id] = Departure(job.job_id, target, moved)
            return False
        finally:
            self._under_way.discard(job.job_id)
            if not self._under_way:
                self._settled.set()

    def _moved(self) -> set[JobId]:
        return {job_id for job_id, each in self.departures.items() if each.moved}
