"""When a replica may claim under the gears in force: whose turn it is, and when a batch begins.

    nobody asks for shares or batches      claim at once, as many as there is room for
    this worker is not ahead of its share  claim at once, up to what it is behind
    it is ahead                            others have GRACE_S; what they leave is claimed
    the engine is idle, a trigger is set   claim when so many wait, or one has waited long enough
    it computes, a trigger is set          claim what waits; never block, for it may be idle by then

Ahead or waiting for a batch, a worker claims nothing while it waits: a job is there for whoever has
its turn sooner, and for the client who cancels it. What nobody else wants waits GRACE_S longer, so
that a node which is slow, full or dead strands nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gearfall.core.gears.claim_rule import ClaimRule
from gearfall.core.ids import ModelName
from gearfall.core.ports import Arrivals, JobQueue
from services.worker.jobs.share_credit import ShareCredit

GRACE_S = 0.004
"""A worker that blocks on the queue has claimed long before."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One claim that may be made now."""

    max_jobs: int
    block_s: float


class Turns:
    """Owner of one replica's credit."""

    def __init__(
        self, model: ModelName, queue: JobQueue, rule: Callable[[], ClaimRule], block_s: float
    ) -> None:
        """`rule` is asked before each claim."""
        self._model = model
        self._queue = queue
        self._rule = rule
        self._block_s = block_s
        self._credit = ShareCredit()

    async def next(
        self, room: int, *, is_idle: bool, pause: Callable[[float], Awaitable[None]]
    ) -> Turn | None:
        """Return the claim to make, or None to ask again. Raises Unavailable.

        `pause` returns after so many seconds, or earlier when the replica stops.
        """
        rule = self._rule()
        waits_for_batch = is_idle and rule.trigger > 1
        if rule.share is None:
            self._credit.forget()
            if rule.trigger == 1:
                return Turn(room, self._block_s)
        elif rule.trigger == 1 and self._credit.is_begun and self._credit.credit >= 0.0:
            # What came since can only have put it further behind.
            return Turn(min(room, self._credit.most_jobs), self._block_s)
        now = await self._look(rule)
        if rule.trigger > 1 and not is_idle and now.waiting == 0:
            await self._queue.wait_arrival(self._model, now, block_s=self._block_s)
            return None
        if waits_for_batch:
            found = await self._batch(rule, now, room)
            if found is None:
                return None
            now = found
        if rule.share is None or not self._credit.is_ahead:
            most = room if rule.share is None else min(room, self._credit.most_jobs)
            return Turn(most, 0.0 if rule.trigger > 1 else self._block_s)
        return await self._after_others(rule, now, room, pause)

    def note_taken(self, jobs: int) -> None:
        """The claim brought jobs."""
        self._credit.note_taken(jobs)

    async def _after_others(
        self,
        rule: ClaimRule,
        now: Arrivals,
        room: int,
        pause: Callable[[float], Awaitable[None]],
    ) -> Turn | None:
        """Return the claim of a worker that is ahead: of what others have left."""
        if now.waiting == 0:
            if not await self._queue.wait_arrival(self._model, now, block_s=self._block_s):
                return None
            await self._look(rule)
            if not self._credit.is_ahead:
                return Turn(min(room, self._credit.most_jobs), 0.0)
        await pause(GRACE_S)
        return Turn(room, 0.0)

    async def _look(self, rule: ClaimRule) -> Arrivals:
        now = await self._queue.arrivals(self._model)
        if rule.share is not None:
            self._credit.note_arrivals(now.appended, rule.share)
        return now

    async def _batch(self, rule: ClaimRule, now: Arrivals, room: int) -> Arrivals | None:
        """Return when a batch may begin; None when nothing came for a while."""
        if now.waiting == 0:
            if not await self._queue.wait_arrival(self._model, now, block_s=self._block_s):
                return None
            now = await self._look(rule)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + rule.most_wait_s
        wanted = min(rule.trigger, room)
        while now.waiting < wanted and (left_s := until_s - loop.time()) > 0:
            await self._queue.wait_arrival(self._model, now, block_s=left_s)
            now = await self._look(rule)
        return now
