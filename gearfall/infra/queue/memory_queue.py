"""The job queue in memory, behind the same port as Redis Streams: for unit tests only.

`MemoryQueueServer` is the server; each `MemoryQueue` is one client of it. The server's controls
(`stop`, `start`, `flush`, `append_malformed`) play the faults that the port promises to survive.
"""

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gearfall.core.errors import Overloaded, Unavailable
from gearfall.core.generation.job import Job, Priority
from gearfall.core.ids import ModelName
from gearfall.core.ports import Arrivals, QueueDepth, QueuedJob

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    job: Job | None
    """None plays an entry that does not decode."""
    consumer: str | None = None
    deliveries: int = 0

    @property
    def is_batch(self) -> bool:
        """Whether it gives way to interactive jobs."""
        return self.job is not None and self.job.priority is Priority.BATCH


@dataclass(slots=True)
class MemoryQueueServer:
    """Queues that several clients share, with controls for faults."""

    is_up: bool = True
    queues: dict[ModelName, dict[str, _Entry]] = field(default_factory=dict)
    appended: dict[ModelName, int] = field(default_factory=dict)
    """Entries ever appended."""
    change: asyncio.Event = field(default_factory=asyncio.Event)
    restarts: int = 0
    is_full: bool = False
    """Whether appends are refused, as by a server that has no memory left."""
    refused: int = 0
    """Appends."""
    _kept: dict[ModelName, dict[str, _Entry]] | None = None
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def stop(self) -> None:
        """Become unreachable: calls raise Unavailable, blocked claims too."""
        self.is_up = False
        self.announce()

    def start(self) -> None:
        """Become reachable again with all data, or with what it had when it began to forget."""
        if self._kept is not None:
            self.queues, self._kept = self._kept, None
        self.restarts += 1
        self.is_up = True
        self.announce()

    def forget_from_now(self) -> None:
        """Keep nothing that happens before the next start beyond it."""
        self._kept = {
            model: {key: replace(entry) for key, entry in entries.items()}
            for model, entries in self.queues.items()
        }

    def flush(self) -> None:
        """Lose all data."""
        self.queues.clear()
        self.appended.clear()
        self.announce()

    def append_malformed(self, model: ModelName) -> str:
        """Append an entry that does not decode."""
        return self.append(model, None)

    def append(self, model: ModelName, job: Job | None) -> str:
        """Append an entry and return its id."""
        entry_id = f"{next(self._ids)}-0"
        self.queues.setdefault(model, {})[entry_id] = _Entry(job)
        self.appended[model] = self.appended.get(model, 0) + 1
        self.announce()
        return entry_id

    def announce(self) -> None:
        """Wake every blocked claim."""
        self.change.set()
        self.change = asyncio.Event()


class MemoryQueue:
    """One client of a `MemoryQueueServer`; with a server of its own if none is given."""

    def __init__(self, server: MemoryQueueServer | None = None) -> None:
        self.server = server or MemoryQueueServer()
        self._is_closed = False
        self._held: defaultdict[tuple[ModelName, str], set[str]] = defaultdict(set)
        self._looked_at: dict[tuple[ModelName, str], int] = {}
        """The server's start after which this client last looked what it holds there."""

    @property
    def restarts(self) -> int:
        """See the port."""
        return self.server.restarts

    async def append(self, job: Job) -> str:
        """See the port."""
        self._reach()
        if self.server.is_full:
            self.server.refused += 1
            raise Overloaded("the queue is full", retry_after_s=1.0)
        return self.server.append(job.model, job)

    async def claim(
        self,
        model: ModelName,
        consumer: str,
        *,
        max_jobs: int,
        block_s: float,
        max_batch_jobs: int | None = None,
    ) -> Sequence[QueuedJob]:
        """See the port."""
        if unseen := self._unseen(model, consumer, max_jobs):
            return self._hand_out(model, consumer, unseen)
        max_batch = max_jobs if max_batch_jobs is None else max_batch_jobs
        try:
            async with asyncio.timeout(block_s):
                while not self._waiting(model, max_batch):
                    await self.server.change.wait()
        except TimeoutError:
            pass
        waiting = self._waiting(model, max_batch)[:max_jobs]
        return self._hand_out(model, consumer, waiting)

    async def peek(self, model: ModelName, *, max_jobs: int) -> Sequence[Job]:
        """See the port."""
        entries = self._reach().get(model, {})
        waiting = [entries[key].job for key in self._waiting(model, max_jobs)[:max_jobs]]
        return [job for job in waiting if job is not None]

    async def acknowledge(self, model: ModelName, entry_ids: Sequence[str]) -> None:
        """See the port."""
        entries = self._reach().get(model, {})
        for entry_id in entry_ids:
            entries.pop(entry_id, None)
        for (held_model, _), held in self._held.items():
            if held_model == model:
                held.difference_update(entry_ids)

    async def reclaim(
        self, model: ModelName, consumer: str, *, alive: frozenset[str], max_jobs: int
    ) -> Sequence[QueuedJob]:
        """See the port."""
        entries = self._reach().get(model, {})
        spared = {*alive, consumer, None}
        orphans = [key for key, entry in entries.items() if entry.consumer not in spared]
        orphans.sort(key=lambda key: entries[key].is_batch)
        orphans = [*self._unseen(model, consumer, max_jobs), *orphans]
        return self._hand_out(model, consumer, orphans[:max_jobs])

    async def cancel(self, model: ModelName, entry_id: str) -> bool:
        """See the port."""
        entries = self._reach().get(model, {})
        entry = entries.get(entry_id)
        if entry is None or entry.consumer is not None:
            return False
        del entries[entry_id]
        return True

    async def contains(self, model: ModelName, entry_id: str) -> bool:
        """See the port."""
        return entry_id in self._reach().get(model, {})

    async def holder(self, model: ModelName, entry_id: str) -> str | None:
        """See the port."""
        entry = self._reach().get(model, {}).get(entry_id)
        return entry.consumer if entry is not None else None

    async def depth(self, model: ModelName) -> QueueDepth:
        """See the port."""
        entries = self._reach().get(model, {})
        claimed = sum(entry.consumer is not None for entry in entries.values())
        return QueueDepth(waiting=len(entries) - claimed, claimed=claimed)

    async def arrivals(self, model: ModelName) -> Arrivals:
        """See the port."""
        waiting = (await self.depth(model)).waiting
        appended = self.server.appended.get(model, 0)
        return Arrivals(appended, waiting, (str(appended),))

    async def wait_arrival(self, model: ModelName, since: Arrivals, *, block_s: float) -> bool:
        """See the port."""
        try:
            async with asyncio.timeout(block_s):
                while (await self.arrivals(model)).newest == since.newest:
                    await self.server.change.wait()
        except TimeoutError:
            return False
        return True

    async def drop(self, model: ModelName) -> None:
        """See the port."""
        self._reach().pop(model, None)
        self.server.appended.pop(model, None)

    async def close(self) -> None:
        """Close this client only."""
        self._is_closed = True
        self.server.announce()

    def _reach(self) -> dict[ModelName, dict[str, _Entry]]:
        if self._is_closed or not self.server.is_up:
            raise Unavailable("the queue server can't be reached")
        return self.server.queues

    def _waiting(self, model: ModelName, max_batch: int) -> Sequence[str]:
        """Entries that nobody claimed: interactive ones, then so many batch ones."""
        entries = self._reach().get(model, {})
        waiting = [(key, entry.is_batch) for key, entry in entries.items() if not entry.consumer]
        batch = [key for key, is_batch in waiting if is_batch]
        return [key for key, is_batch in waiting if not is_batch] + batch[:max_batch]

    def _unseen(self, model: ModelName, consumer: str, max_jobs: int) -> Sequence[str]:
        """Entries that a server which came back says are the consumer's, and it does not know."""
        place = (model, consumer)
        if self._looked_at.setdefault(place, self.server.restarts) == self.server.restarts:
            return ()
        entries = self._reach().get(model, {})
        unseen = [
            key
            for key, entry in entries.items()
            if entry.consumer == consumer and key not in self._held[place]
        ]
        if not unseen:
            self._looked_at[place] = self.server.restarts
        return unseen[:max_jobs]

    def _hand_out(
        self, model: ModelName, consumer: str, entry_ids: Sequence[str]
    ) -> Sequence[QueuedJob]:
        entries = self.server.queues.get(model, {})
        handed: list[QueuedJob] = []
        for entry_id in entry_ids:
            entry = entries[entry_id]
            if entry.job is None:
                _log.warning("dropped a malformed queue entry", extra={"model": model})
                del entries[entry_id]
                continue
            entry.consumer = consumer
            entry.deliveries += 1
            self._held[model, consumer].add(entry_id)
            handed.append(QueuedJob(entry_id, entry.job, entry.deliveries))
        return handed
