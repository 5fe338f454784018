"""Brings models from SSD to the DRAM pool: one load a model, one at a time, by priority."""

import asyncio
import heapq
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from gearfall.core.errors import CorruptCheckpoint, GearfallError, Internal, Unavailable
from gearfall.core.ids import ModelName
from gearfall.core.records import StartTimeline, Tier
from services.store.flight import Flight
from services.store.pool import Pool, Resident
from services.store.pool_memory import ReadChunks, load_partition
from services.store.ssd_tier import SsdTier, StoredModel

_RECENT_LOADS = 8
_MIN_MEASURED_BYTES = 2**20
"""The time of a smaller load is latency and says nothing about bandwidth."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Bytes of a model that are verified in the pool."""

    tier: Tier
    """The tier that is read."""
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in the pool and what it took to bring it there."""

    digest: str
    size_bytes: int
    timeline: StartTimeline


LoadFlight = Flight[LoadProgress, Loaded]


@dataclass(slots=True)
class _Waiting:
    stored: StoredModel
    flight: LoadFlight
    asked_s: float
    priority: int


class Loader:
    """Owns the loads. `run` carries them out until `stop`."""

    def __init__(
        self,
        ssd: SsdTier,
        pool: Pool,
        read: ReadChunks,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_broken` is called after a model turned out to be corrupt."""
        self._ssd = ssd
        self._pool = pool
        self._read = read
        self._on_broken = on_broken
        self._flights: dict[ModelName, _Waiting] = {}
        self._order: list[tuple[int, int, ModelName]] = []
        self._counter = itertools.count()
        self._has_work = asyncio.Event()
        self._is_stopped = threading.Event()
        self._recent: deque[float] = deque(maxlen=_RECENT_LOADS)

    @property
    def bytes_per_s(self) -> float:
        """Median speed of recent loads, SSD to verified in DRAM; 0 before the first."""
        return median(self._recent) if self._recent else 0.0

    @property
    def queued_bytes(self) -> int:
        """Bytes still to move for loads that were asked for."""
        states = (waiting.flight.progress for waiting in self._flights.values())
        return sum(state.total_bytes - state.done_bytes for state in states)

    def is_loading(self, model: ModelName) -> bool:
        """Whether a load of the model waits or runs."""
        return model in self._flights

    def load(self, model: ModelName, priority: int = 0) -> LoadFlight:
        """Return the flight that brings a model to the pool: the one under way or a new one.

        Raises NotFound or CorruptCheckpoint at once; other errors come through the flight.
        """
        if self._is_stopped.is_set():
            raise Unavailable("the store is stopping")
        waiting = self._flights.get(model)
        if waiting is None:
            resident = self._pool.get(model)
            if resident is not None:
                return _resident_flight(resident)
            stored = self._ssd.get(model)
            start = LoadProgress(Tier.SSD, 0, stored.manifest.size_bytes)
            waiting = _Waiting(stored, Flight(start), time.monotonic(), priority)
            self._flights[model] = waiting
        elif priority <= waiting.priority:
            return waiting.flight
        # A raised priority leaves its older place in the order behind; `run` skips it.
        waiting.priority = priority
        heapq.heappush(self._order, (-priority, next(self._counter), model))
        self._has_work.set()
        return waiting.flight

    async def run(self) -> None:
        """Carry out loads, highest priority first, until cancelled."""
        try:
            while True:
                await self._has_work.wait()
                if not self._order:
                    self._has_work.clear()
                    continue
                _, _, model = heapq.heappop(self._order)
                if model in self._flights:
                    await self._carry_out(self._flights[model])
        finally:
            self.stop()

    def stop(self) -> None:
        """Give up what runs and waits; followers get Unavailable. Idempotent."""
        self._is_stopped.set()
        for model in list(self._flights):
            self._flights.pop(model).flight.fail(Unavailable("the store is stopping"))

    async def _carry_out(self, waiting: _Waiting) -> None:
        stored, flight = waiting.stored, waiting.flight
        started_s = time.monotonic()
        try:
            self._pool.reserve(stored.name, stored.manifest.size_bytes)
            resident = await self._read_model(stored, flight)
            self._pool.commit(resident)
        except Exception as error:
            self._pool.cancel(stored.name)
            self._fail(waiting, error)
            return
        ended_s = time.monotonic()
        if resident.size_bytes >= _MIN_MEASURED_BYTES:
            self._recent.append(resident.size_bytes / max(ended_s - started_s, 1e-9))
        timeline = StartTimeline(
            queued_s=started_s - waiting.asked_s,
            ssd_s=ended_s - started_s,
            total_s=ended_s - waiting.asked_s,
            from_tier=Tier.SSD,
        )
        self._flights.pop(stored.name, None)
        flight.succeed(Loaded(stored.digest, resident.size_bytes, timeline))
        _log.info(
            "model loaded",
            extra={
                "model": stored.name,
                "bytes": resident.size_bytes,
                "seconds": round(timeline.ssd_s, 4),
            },
        )

    def _fail(self, waiting: _Waiting, error: Exception) -> None:
        name = waiting.stored.name
        if isinstance(error, CorruptCheckpoint):
            self._ssd.mark_broken(name, error)
            self._on_broken()
        elif isinstance(error, OSError):
            error = Unavailable(f"model {name!r} cannot be read: {error}")
        elif not isinstance(error, GearfallError):
            _log.exception("unexpected error in a load", extra={"model": name})
            error = Internal(f"loading {name!r} failed: {type(error).__name__}")
        _log.warning("load failed", extra={"model": name, "error": str(error)})
        self._flights.pop(name, None)
        waiting.flight.fail(error)

    async def _read_model(self, stored: StoredModel, flight: LoadFlight) -> Resident:
        loop = asyncio.get_running_loop()
        total_bytes = stored.manifest.size_bytes
        done_bytes = 0

        def report(size_bytes: int) -> None:
            nonlocal done_bytes
            if self._is_stopped.is_set():
                raise Unavailable("the store is stopping")
            done_bytes += size_bytes
            progress = LoadProgress(Tier.SSD, done_bytes, total_bytes)
            loop.call_soon_threadsafe(flight.publish, progress)

        def read_all() -> tuple[int, ...]:
            fds: list[int] = []
            try:
                for index, partition in enumerate(stored.manifest.partitions):
                    path = stored.partition_path(index)
                    fds.append(load_partition(path, partition, self._read, report))
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise
            return tuple(fds)

        fds = await asyncio.to_thread(read_all)
        sizes = tuple(partition.size_bytes for partition in stored.manifest.partitions)
        return Resident(stored.name, stored.digest, stored.manifest_json, fds, sizes)


def _resident_flight(resident: Resident) -> LoadFlight:
    flight: LoadFlight = Flight(LoadProgress(Tier.DRAM, resident.size_bytes, resident.size_bytes))
    timeline = StartTimeline(from_tier=Tier.DRAM)
    flight.succeed(Loaded(resident.digest, resident.size_bytes, timeline))
    return flight
