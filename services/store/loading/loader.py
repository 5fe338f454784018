"""Brings models up the tiers: one load a model, whoever asks; demand before prefetch.

A load is *near* when the bytes are on SSD, else *far*. One near and one far load run at a time:
each of them can fill its tier. Who has a higher priority starts first, then who is needed for
longer. A negative priority is a prefetch: it starts when nobody waits for anything, a near one
gives way when a demand comes and starts over later, a far one pauses between chunks and keeps what
it has.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable

from gearfall.core.errors import CorruptCheckpoint, GearfallError, Unavailable
from gearfall.core.ids import ModelName
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from services.store.loading.filling import Filling
from services.store.loading.flight import Flight
from services.store.loading.load import (
    Far,
    GivenUp,
    Load,
    Loaded,
    LoadEnd,
    LoadFlight,
    LoadOutcome,
    LoadProgress,
    NothingFar,
    done_flight,
)
from services.store.loading.pool_read import read_model
from services.store.loading.recent_speeds import RecentSpeeds
from services.store.tiers.pool import Pool, Resident
from services.store.tiers.pool_memory import ReadChunks
from services.store.tiers.ssd_tier import SsdTier

_log = logging.getLogger(__name__)


class Loader:
    """Owns the loads. `run` carries them out until `stop`."""

    def __init__(
        self,
        ssd: SsdTier,
        pool: Pool,
        read: ReadChunks,
        on_broken: Callable[[], None] = lambda: None,
        *,
        on_ended: Callable[[LoadEnd], None] = lambda _: None,
    ) -> None:
        """`on_broken` is called after a model turned out to be corrupt, `on_ended` after a load."""
        self._ssd = ssd
        self._pool = pool
        self._read = read
        self._on_broken = on_broken
        self._on_ended = on_ended
        self.far: Far = NothingFar()
        self._loads: dict[ModelName, Load] = {}
        self._ending: dict[ModelName, asyncio.Task[None]] = {}
        """Tasks of cancelled loads, which hold memory and files until they have ended."""
        self._counter = itertools.count()
        self._changed = asyncio.Event()
        self._is_stopped = False
        self._speeds = RecentSpeeds((Tier.REMOTE, Tier.SSD))

    @property
    def bytes_per_s(self) -> float:
        """Median speed of recent loads, SSD to verified in DRAM; 0 before the first."""
        return self.bandwidth_of(Tier.SSD)

    def queued_bytes_of(self, *, is_far: bool) -> int:
        """Bytes still to move from elsewhere, or from SSD."""
        states = (load.flight.progress for load in self._loads.values() if load.is_far == is_far)
        return sum(state.total_bytes - state.done_bytes for state in states)

    def bandwidth_of(self, tier: Tier) -> float:
        """Median bytes per second of recent loads out of a tier; 0 before the first."""
        return self._speeds.of(tier)

    def is_loading(self, model: ModelName) -> bool:
        """Whether a load of the model waits or runs."""
        return model in self._loads

    def filling_of(self, model: ModelName) -> Filling | None:
        """Return the memory that a load of the model is filling now."""
        load = self._loads.get(model)
        return load.filling if load else None

    def load(
        self,
        model: ModelName,
        priority: int = 0,
        target: Tier = Tier.DRAM,
        *,
        wanted_unix_s: float = 0.0,
    ) -> LoadFlight:
        """Return the flight that brings a model up to `target`: the one under way or a new one.

        `wanted_unix_s`: when the need arose, by the clock of who decided; 0 for now. The order of
        the decisions that wait for loads is kept so, whichever of their requests came first: their
        predictions count on it.
        Raises NotFound or CorruptCheckpoint at once; other errors come through the flight.
        """
        if self._is_stopped:
            raise Unavailable("the store is stopping")
        wanted_unix_s = wanted_unix_s or time.time()
        load = self._loads.get(model)
        if load is None:
            there = self._flight_if_there(model, target)
            if there is not None:
                tier = there.progress.tier
                self._on_ended(LoadEnd(model, tier, LoadOutcome.DONE, 0, 0.0))
                return there
            load = self._begin(model, priority, target, wanted_unix_s)
        load.priority = max(load.priority, priority)
        load.wanted_unix_s = min(load.wanted_unix_s, wanted_unix_s)
        if target is Tier.DRAM:
            load.target = target
        self._changed.set()
        return load.flight

    def cancel_prefetch(self, model: ModelName) -> bool:
        """Give up a load that nobody waits for; False when there is none."""
        load = self._loads.get(model)
        if load is None or load.is_demanded:
            return False
        self._end(load, LoadOutcome.CANCELLED)
        load.gives_up.set()
        if load.task is not None and not load.task.done():
            load.task.cancel()
            self._ending[model] = load.task
            load.task.add_done_callback(lambda task: self._note_ended(model, task))
        load.flight.fail(Unavailable(f"the prefetch of {model!r} was cancelled"))
        return True

    def _note_ended(self, model: ModelName, task: asyncio.Task[None]) -> None:
        if self._ending.get(model) is task:
            del self._ending[model]
        self._changed.set()

    async def run(self) -> None:
        """Carry out loads until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    self._changed.clear()
                    self._start_what_may(tasks)
                    await self._changed.wait()
        finally:
            self.stop()

    def stop(self) -> None:
        """Give up what runs and waits; followers get Unavailable. Idempotent."""
        self._is_stopped = True
        for load in list(self._loads.values()):
            self._end(load, LoadOutcome.CANCELLED)
            load.gives_up.set()
            load.flight.fail(Unavailable("the store is stopping"))

    def _flight_if_there(self, model: ModelName, target: Tier) -> LoadFlight | None:
        resident = self._pool.get(model)
        is_far = model not in self._ssd.models and self.far.size_of(model) is not None
        if resident is not None and not (target is Tier.SSD and is_far):
            return done_flight(Tier.DRAM, resident.digest, resident.size_bytes)
        stored = self._ssd.models.get(model)
        if stored is not None and target is Tier.SSD:
            return done_flight(Tier.SSD, stored.digest, stored.manifest.size_bytes)
        return None

    def _begin(self, model: ModelName, priority: int, target: Tier, wanted_unix_s: float) -> Load:
        far_bytes = self.far.size_of(model)
        is_far = model not in self._ssd.models and far_bytes is not None
        if is_far:
            assert far_bytes is not None
            start = LoadProgress(Tier.REMOTE, 0, far_bytes)
        else:
            start = LoadProgress(Tier.SSD, 0, self._ssd.get(model).manifest.size_bytes)
        number, now_s = next(self._counter), time.monotonic()
        load = Load(
            model, Flight(start), priority, target, number, now_s, wanted_unix_s, is_far=is_far
        )
        self._loads[model] = load
        return load

    def _end(self, load: Load, outcome: LoadOutcome, moved_bytes: int = 0) -> None:
        self._changed.set()
        if self._loads.get(load.model) is not load:
            return
        del self._loads[load.model]
        # A far load that has its bytes is near from then on: they came from elsewhere all the same.
        from_tier = Tier.REMOTE if load.is_far or load.remote_s else Tier.SSD
        seconds = time.monotonic() - load.asked_s
        self._on_ended(LoadEnd(load.model, from_tier, outcome, moved_bytes, seconds))

    def _start_what_may(self, tasks: asyncio.TaskGroup) -> None:
        ordered = sorted(self._loads.values(), key=_turn)
        is_anyone_waiting = any(load.is_demanded for load in ordered)
        for load in ordered:
            if load.task is None and self._may_start(load, is_anyone_waiting):
                load.task = tasks.create_task(self._carry_out(load))
            if load.is_demanded or not is_anyone_waiting:
                load.may_go_on.set()
            else:
                load.may_go_on.clear()

    def _may_start(self, load: Load, is_anyone_waiting: bool) -> bool:
        if load.model in self._ending:
            return False
        alike = [
            other
            for other in self._loads.values()
            if other.task is not None and other.is_far == load.is_far
        ]
        if not load.is_demanded:
            return not alike and not is_anyone_waiting
        if load.is_far:
            # A paused prefetch holds no bandwidth, only what it has fetched.
            return not any(other.is_demanded for other in alike)
        for other in alike:
            if not other.is_demanded:
                other.gives_up.set()
        return not alike

    async def _carry_out(self, load: Load) -> None:
        load.started_s = load.started_s or time.monotonic()
        try:
            await self._raise_to_target(load)
        except GivenUp:
            self._start_over(load)
        except Exception as error:
            self._fail(load, error)
        else:
            self._succeed(load)
        finally:
            self._changed.set()

    async def _raise_to_target(self, load: Load) -> None:
        if load.is_far:
            await self._fetch(load)
        if load.target is Tier.DRAM and self._pool.get(load.model) is None:
            await self._read_near(load)

    async def _fetch(self, load: Load) -> None:
        began_s = time.monotonic()
        is_pooled, size_bytes = load.target is Tier.DRAM, load.flight.progress.total_bytes
        if is_pooled:
            self._pool.reserve(load.model, size_bytes)
        try:
            resident = await self.far.fetch(load.model, load, is_pooled=is_pooled)
            if resident is not None:
                self._commit(load, resident)
        except BaseException as error:
            load.end_filling(load.failure_of(error))
            raise
        finally:
            self._pool.cancel(load.model)
        load.is_far = False
        load.remote_s = time.monotonic() - began_s
        self._speeds.note(Tier.REMOTE, size_bytes, load.remote_s)

    async def _read_near(self, load: Load) -> None:
        stored = self._ssd.get(load.model)
        size_bytes, began_s = stored.manifest.size_bytes, time.monotonic()
        load.flight.publish(LoadProgress(Tier.SSD, 0, size_bytes))
        self._pool.reserve(load.model, size_bytes)
        try:
            read = read_model(
                stored,
                self._read,
                load.report,
                load.gives_up,
                begin=load.begin_filling,
                allocate=self._pool.memory_for(load.model),
            )
            self._commit(load, await read)
        except BaseException as error:
            load.end_filling(load.failure_of(error))
            if isinstance(error, CorruptCheckpoint):
                self._ssd.mark_broken(load.model, error)
                self._on_broken()
            raise
        finally:
            self._pool.cancel(load.model)
        load.ssd_s = time.monotonic() - began_s
        self._speeds.note(Tier.SSD, size_bytes, load.ssd_s)

    def _commit(self, load: Load, resident: Resident) -> None:
        """Make a model visible; who holds it already leases it from here on."""
        self._pool.commit(resident)
        filling, load.filling = load.filling, None
        if filling is not None:
            for holder in filling.holders:
                self._pool.lease(resident.model, resident.digest, holder)
            filling.succeed(resident)

    def _start_over(self, load: Load) -> None:
        if self._loads.get(load.model) is load:
            load.task = None
            load.gives_up.clear()

    def _succeed(self, load: Load) -> None:
        stored = self._ssd.get(load.model)
        ended_s, size_bytes = time.monotonic(), stored.manifest.size_bytes
        self._end(load, LoadOutcome.DONE, size_bytes)
        timeline = StartTimeline(
            queued_s=load.started_s - load.asked_s,
            remote_s=load.remote_s,
            ssd_s=load.ssd_s,
            total_s=ended_s - load.asked_s,
            from_tier=Tier.REMOTE if load.remote_s else Tier.SSD,
        )
        load.flight.succeed(Loaded(stored.digest, size_bytes, timeline, load.target))
        seconds = round(load.remote_s + load.ssd_s, 4)
        _log.info(
            "model loaded",
            extra={"model": load.model, "bytes": size_bytes, "seconds": seconds},
        )

    def _fail(self, load: Load, error: Exception) -> None:
        if not isinstance(error, (GearfallError, OSError)):
            _log.exception("unexpected error in a load", extra={"model": load.model})
        failure = load.failure_of(error)
        _log.warning("load failed", extra={"model": load.model, "error": failure.message})
        is_corrupt = isinstance(failure, CorruptCheckpoint)
        self._end(load, LoadOutcome.CORRUPT if is_corrupt else LoadOutcome.FAILED)
        load.flight.fail(failure)


def _turn(load: Load) -> tuple[int, float, int]:
    return -load.priority, load.wanted_unix_s, load.number
