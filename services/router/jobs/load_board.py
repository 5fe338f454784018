"""Tells the scheduler what comes for each model, so that replicas can be there before jobs wait.

A model's record is written at most every EVERY_S while it changes, and all records together at most
every PACE_S: with n models changing, each is written every n x PACE_S, whoever waited longest
first. A model that has been idle for IDLE_S has no record; its totals go on when it comes back.

What comes for a cold model is told as demand too, and somebody waits for what follows from that:
load keeps out of its way, as each write to cluster state waits until the one before is on disk.
"""

import asyncio
import contextlib
import heapq
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gearfall.core.errors import GearfallError
from gearfall.core.ids import ModelName, RouterId
from gearfall.core.ports import Lease
from gearfall.core.records import LoadRecord

_log = logging.getLogger(__name__)

EVERY_S = 1.0
PACE_S = 0.02
BEHIND_S = 0.1
"""From a change to its record at least."""
IDLE_S = 60.0
_RETRY_S = 0.5


class LoadWriter(Protocol):
    """The part of the cluster that the load board needs."""

    async def put_load(self, record: LoadRecord, *, lease: Lease) -> int:
        """Write the record under the router's lease."""
        ...

    async def delete_load(self, model: ModelName, router_id: RouterId) -> object:
        """Delete the record."""
        ...


@dataclass(slots=True)
class _Count:
    """What came for one model since the router began."""

    arrived_jobs: int = 0
    arrived_prompt_tokens: int = 0
    produced_tokens: int = 0
    unfinished_jobs: int = 0
    is_changed: bool = False
    """Since the record was written."""
    is_written: bool = False
    """Whether a record stands under the present lease."""
    looked_s: float = float("-inf")
    """When its record was last written or deleted, on the loop's clock."""
    due_s: float | None = None
    """When to look at it next."""


class LoadBoard:
    """Owner of this router's load records. A LoadMeter."""

    def __init__(
        self,
        writer: LoadWriter,
        router_id: RouterId,
        *,
        clock: Callable[[], float] = time.time,
        every_s: float = EVERY_S,
        pace_s: float = PACE_S,
        behind_s: float = BEHIND_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self._writer = writer
        self._router_id = router_id
        self._clock = clock
        self._every_s = every_s
        self._pace_s = pace_s
        self._behind_s = behind_s
        self._idle_s = idle_s
        self._lease: Lease | None = None
        self._counts: dict[ModelName, _Count] = {}
        self._due: list[tuple[float, ModelName]] = []
        """A heap; an entry that is not its model's `due_s` is out of date."""
        self._wake = asyncio.Event()
        self._is_failing = False

    def arrived(self, model: ModelName, prompt_tokens: int) -> None:
        """A job came."""
        count = self._counts.setdefault(model, _Count())
        count.arrived_jobs += 1
        count.arrived_prompt_tokens += prompt_tokens
        count.unfinished_jobs += 1
        self._change(model, count)

    def produced(self, model: ModelName, tokens: int) -> None:
        """A job that came got tokens."""
        count = self._counts[model]
        count.produced_tokens += tokens
        if not count.is_changed:
            self._change(model, count)

    def ended(self, model: ModelName) -> None:
        """A job that came is over."""
        count = self._counts[model]
        count.unfinished_jobs -= 1
        self._change(model, count)

    def set_lease(self, lease: Lease) -> None:
        """The router has a new lease: what stood under the old one is written again."""
        self._lease = lease
        for model, count in self._counts.items():
            count.is_written = False
            if count.unfinished_jobs or count.is_changed:
                self._change(model, count)
        self._wake.set()

    async def run(self) -> None:
        """Write what changed, for ever. One write at a time; failures are tried again."""
        loop = asyncio.get_running_loop()
        while True:
            await self._until_due()
            _, model = heapq.heappop(self._due)
            self._counts[model].due_s = None
            began_s = loop.time()
            if await self._reconcile(model, self._counts[model]):
                await asyncio.sleep(max(0.0, began_s + self._pace_s - loop.time()))

    def check(self) -> None:
        """Assert the invariant: what changed is due, and nothing counts below zero."""
        planned = set(self._due)
        for model, count in self._counts.items():
            assert count.unfinished_jobs >= 0, model
            assert not count.is_changed or (count.due_s, model) in planned, model

    def _change(self, model: ModelName, count: _Count) -> None:
        count.is_changed = True
        behind_s = asyncio.get_running_loop().time() + self._behind_s
        self._look_at(model, count, max(behind_s, count.looked_s + self._every_s))

    def _look_at(self, model: ModelName, count: _Count, at_s: float) -> None:
        """Have `run` look at a model at a time, or earlier if it is to already."""
        at_s = max(at_s, asyncio.get_running_loop().time())
        if count.due_s is not None and count.due_s <= at_s:
            return
        count.due_s = at_s
        heapq.heappush(self._due, (at_s, model))
        if self._due[0][1] == model:
            self._wake.set()

    async def _until_due(self) -> None:
        """Return when the first entry of the heap is one to act on now."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            while self._due and self._counts[self._due[0][1]].due_s != self._due[0][0]:
                heapq.heappop(self._due)
            at_s = self._due[0][0] if self._due and self._lease is not None else None
            if at_s is not None and at_s <= loop.time():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(at_s):
                    await self._wake.wait()

    async def _reconcile(self, model: ModelName, count: _Count) -> bool:
        """Write or delete the record of one model if that is due; say whether anything was sent."""
        now_s = asyncio.get_running_loop().time()
        lease = self._lease
        is_idle = not count.is_changed and not count.unfinished_jobs
        if lease is None or not (count.is_changed or (is_idle and count.is_written)):
            return False
        was_changed = count.is_changed
        count.is_changed = False
        count.looked_s = now_s
        try:
            if is_idle:
                count.is_written = False
                await self._writer.delete_load(model, self._router_id)
            else:
                count.is_written = True
                await self._writer.put_load(self._record(model, count), lease=lease)
                if not count.unfinished_jobs:
                    self._look_at(model, count, now_s + self._idle_s)
            self._is_failing = False
        except GearfallError as error:
            self._note_failure(error)
            count.is_changed = count.is_changed or was_changed
            count.is_written = True
            self._look_at(model, count, now_s + _RETRY_S)
        return True

    def _note_failure(self, error: GearfallError) -> None:
        if not self._is_failing:
            _log.warning("could not write load", extra={"error": error.message})
        self._is_failing = True

    def _record(self, model: ModelName, count: _Count) -> LoadRecord:
        return LoadRecord(
            model,
            self._router_id,
            self._clock(),
            count.arrived_jobs,
            count.arrived_prompt_tokens,
            count.produced_tokens,
            count.unfinished_jobs,
        )
