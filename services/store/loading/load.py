"""One load: what is asked for, how far it is, and the port to what brings bytes from elsewhere."""

import asyncio
import threading
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from gearfall.core.errors import GearfallError, Internal, Unavailable
from gearfall.core.ids import ModelName
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from services.store.loading.filling import Filling
from services.store.loading.flight import Flight
from services.store.tiers.pool import Resident


class GivenUp(Exception):  # noqa: N818 - not an error: another load goes first
    """A load ended because it was told to."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Bytes of a model that are verified in the next tier."""

    tier: Tier
    """The tier that is read."""
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in the tier that was asked for and what it took to bring it there."""

    digest: str
    size_bytes: int
    timeline: StartTimeline
    tier: Tier = Tier.DRAM


LoadFlight = Flight[LoadProgress, Loaded]


class LoadOutcome(Enum):
    """How a load ended."""

    DONE = "done"
    CORRUPT = "corrupt"
    """The bytes were not what the manifest says."""
    CANCELLED = "cancelled"
    """A prefetch that nobody waited for, or the store's own end."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class LoadEnd:
    """One load after the fact."""

    model: ModelName
    from_tier: Tier
    """Where the bytes were when it was asked for."""
    outcome: LoadOutcome
    moved_bytes: int
    """0 for a model that was there already."""
    seconds: float
    """From the request on."""


class Far(Protocol):
    """What brings models from other machines."""

    def size_of(self, model: ModelName) -> int | None:
        """Bytes of a model that can be fetched; None for one that nobody here has heard of."""
        ...

    async def fetch(self, model: ModelName, load: "Load", *, is_pooled: bool) -> Resident | None:
        """Put a model on the SSD tier and, if asked, into pool memory; return the latter.

        Calls `load.go_on` before and `load.report` after each chunk.
        """
        ...


class NothingFar:
    """For a store that stands alone."""

    def size_of(self, _model: ModelName) -> int | None:
        """Nothing is elsewhere."""
        return None

    async def fetch(self, model: ModelName, _load: "Load", *, is_pooled: bool) -> Resident | None:
        """Nothing is elsewhere: nobody asks."""
        raise AssertionError(model, is_pooled)


@dataclass(slots=True, eq=False)
class Load:
    """One load that waits or runs. Owned by the loader."""

    model: ModelName
    flight: LoadFlight
    priority: int
    target: Tier
    number: int
    asked_s: float
    wanted_unix_s: float
    """When the need for it arose, which may be before anybody asked."""
    started_s: float = 0.0
    remote_s: float = 0.0
    ssd_s: float = 0.0
    is_far: bool = False
    task: "asyncio.Task[None] | None" = None
    gives_up: threading.Event = field(default_factory=threading.Event)
    """A near load that was overtaken or cancelled ends at its next report."""
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    filling: Filling | None = None
    """The memory that is being filled, while it is."""

    @property
    def is_demanded(self) -> bool:
        """Whether somebody waits for it."""
        return self.priority >= 0

    async def go_on(self) -> None:
        """Return when the load may take its next chunk."""
        await self.may_go_on.wait()

    def report(self, size_bytes: int) -> None:
        """Count bytes that are verified where they belong."""
        now = self.flight.progress
        done_bytes = now.done_bytes + size_bytes
        self.flight.publish(LoadProgress(now.tier, done_bytes, now.total_bytes))

    def failure_of(self, error: BaseException) -> GearfallError:
        """Return what those who wait for the load are told about what ended it."""
        if isinstance(error, GearfallError):
            return error
        if isinstance(error, OSError):
            return Unavailable(f"model {self.model!r} cannot be read: {error}")
        if isinstance(error, GivenUp):
            return Unavailable(f"the load of {self.model!r} gave way to another")
        if isinstance(error, asyncio.CancelledError):
            return Unavailable(f"the load of {self.model!r} was cancelled")
        return Internal(f"loading {self.model!r} failed: {type(error).__name__}")

    def begin_filling(self, filling: Filling) -> None:
        """Let holders in, and say so to those who follow the load."""
        self.filling = filling
        self.report(0)

    def end_filling(self, error: GearfallError) -> None:
        """Tell holders, if any could be let in, that what they hold is not the model."""
        filling, self.filling = self.filling, None
        if filling is not None:
            filling.fail(error)


def done_flight(tier: Tier, digest: str, size_bytes: int) -> LoadFlight:
    """Return the flight of a model that was there already."""
    flight: LoadFlight = Flight(LoadProgress(tier, size_bytes, size_bytes))
    flight.succeed(Loaded(digest, size_bytes, StartTimeline(from_tier=tier), tier))
    return flight
