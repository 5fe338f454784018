"""The DRAM pool's books: what is resident, who leases it, what makes room. No I/O but closing.

Used from one thread, the event loop's: a lease and an eviction can't race.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from gearfall.core.errors import Conflict, InvalidRequest, NotFound, Overloaded, Unavailable
from gearfall.core.ids import ModelName
from gearfall.core.tiers import Candidate, UseCount, choose_victims
from services.store.tiers.pool_allocator import FreshMemory, PoolAllocator
from services.store.tiers.pool_memory import Allocate

_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Resident:
    """A model whose every chunk was verified on its way into shared memory."""

    model: ModelName
    digest: str
    manifest_json: bytes
    partition_fds: tuple[int, ...]
    """Sealed memfds, in the order of the manifest's partitions; closed by the pool."""
    partition_sizes: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of shared memory."""
        return sum(self.partition_sizes)


class Pool:
    """Owns the resident models. Room is reserved before a load and is never exceeded."""

    def __init__(
        self,
        capacity_bytes: int,
        on_change: Callable[[], None] = lambda: None,
        *,
        bandwidth_below: Callable[[ModelName], float] = lambda _: 0.0,
        allocator: PoolAllocator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_change` is called after every change of what is resident.

        `bandwidth_below`: bytes per second at which a model would come back; 0 while unknown.
        `allocator` is closed with the pool; fresh memory if there is none.
        """
        self.capacity_bytes = capacity_bytes
        self.on_change = on_change
        self.bandwidth_below = bandwidth_below
        self._clock = clock
        self._residents: dict[ModelName, Resident] = {}  # least recently used first
        self._uses: dict[ModelName, UseCount] = {}
        self._reserved: dict[ModelName, int] = {}
        self._holders: dict[ModelName, list[str]] = {}
        self.allocator: PoolAllocator = allocator or FreshMemory()
        self.allocator.fit(self.free_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes resident or reserved by loads under way."""
        resident = sum(resident.size_bytes for resident in self._residents.values())
        return resident + sum(self._reserved.values())

    @property
    def free_bytes(self) -> int:
        """Bytes neither used nor reserved; memory kept ready for a load lies in there."""
        return self.capacity_bytes - self.used_bytes

    @property
    def residents(self) -> Sequence[Resident]:
        """Resident models, least recently used first."""
        return tuple(self._residents.values())

    def get(self, model: ModelName) -> Resident | None:
        """Return a resident model and count it as used now."""
        resident = self._residents.pop(model, None)
        if resident is not None:
            self._residents[model] = resident
            self._count_use(model)
        return resident

    def peek(self, model: ModelName) -> Resident | None:
        """Return a resident model without counting that as a use."""
        return self._residents.get(model)

    def expected_use(self, model: ModelName) -> float:
        """Uses of a model lately, resident or not; older ones count for less."""
        return self._uses.get(model, UseCount()).at(self._clock())

    def forget(self, model: ModelName) -> None:
        """Forget how often a removed model was used."""
        self._uses.pop(model, None)

    def holders(self, model: ModelName) -> Sequence[str]:
        """Who leases a model, one entry for each lease."""
        return tuple(self._holders.get(model, ()))

    @property
    def leases(self) -> int:
        """How many leases there are, on all models."""
        return sum(map(len, self._holders.values()))

    def reserve(self, model: ModelName, size_bytes: int) -> None:
        """Set room aside for a load, evicting what costs least of the models that nobody leases.

        Raises InvalidRequest when the model is larger than the pool, Overloaded when leases and
        other loads leave too little. Nothing is evicted in vain.
        """
        assert model not in self._reserved
        assert model not in self._residents
        if size_bytes > self.capacity_bytes:
            raise InvalidRequest(
                f"model {model!r} takes {size_bytes} bytes and the DRAM pool holds "
                f"{self.capacity_bytes}: start the store with a larger --dram-bytes",
                param="model",
            )
        missing_bytes = size_bytes - self.free_bytes
        victims = choose_victims(self._candidates(), missing_bytes)
        if missing_bytes > 0 and not victims:
            raise Overloaded(
                f"no room for {model!r} in the DRAM pool: {missing_bytes} bytes more are leased "
                "or being loaded",
                retry_after_s=_RETRY_S,
            )
        for victim in victims:
            self.drop(victim)
        self._reserved[model] = size_bytes
        self.allocator.begin(model, size_bytes, self.free_bytes)

    def memory_for(self, model: ModelName) -> Allocate:
        """Return what allocates in the room that was reserved for a load; for any thread."""
        return partial(self.allocator.allocate, model)

    def cancel(self, model: ModelName) -> None:
        """Give back the room of a load that failed. Idempotent."""
        self._reserved.pop(model, None)
        self.allocator.end(model, self.free_bytes)

    def commit(self, resident: Resident) -> None:
        """Make a verified model visible in the room that was reserved for it."""
        reserved = self._reserved.pop(resident.model)
        assert reserved == resident.size_bytes
        self._residents[resident.model] = resident
        self._count_use(resident.model)
        self.allocator.end(resident.model, self.free_bytes)
        self.on_change()

    def lease(self, model: ModelName, digest: str, holder: str) -> Resident:
        """Keep a model from eviction until `release`. Raises Unavailable or Conflict."""
        resident = self.get(model)
        if resident is None:
            raise Unavailable(f"model {model!r} is not in the DRAM pool: load it, then ask again")
        if resident.digest != digest:
            raise Conflict(f"model {model!r} is resident as {resident.digest}, not {digest[:64]}")
        self._holders.setdefault(model, []).append(holder)
        return resident

    def release(self, model: ModelName, holder: str) -> None:
        """End one lease of `holder`."""
        holders = self._holders[model]
        holders.remove(holder)
        if not holders:
            del self._holders[model]

    def check_unleased(self, model: ModelName) -> None:
        """Raise Conflict while somebody leases a model."""
        holders = self._holders.get(model)
        if holders:
            raise Conflict(f"model {model!r} is in use by {', '.join(sorted(set(holders))[:4])}")

    def drop(self, model: ModelName) -> int:
        """Free a resident model and return its bytes. Raises NotFound, or Conflict while leased."""
        self.check_unleased(model)
        resident = self._residents.pop(model, None)
        if resident is None:
            raise NotFound(f"model {model!r} is not in the DRAM pool", param="model")
        for fd in resident.partition_fds:
            os.close(fd)
        self.allocator.fit(self.free_bytes)
        self.on_change()
        return resident.size_bytes

    def close(self) -> None:
        """Free everything; leased memory lives on in its holders until they end."""
        self.allocator.close()
        self._holders.clear()
        for model in list(self._residents):
            self.drop(model)

    def check(self) -> None:
        """Assert the invariant: within capacity, leases on resident models only."""
        assert self.used_bytes <= self.capacity_bytes
        assert all(self._holders.values())
        assert self._holders.keys() <= self._residents.keys()
        assert not self._reserved.keys() & self._residents.keys()

    def _candidates(self) -> Sequence[Candidate]:
        return [
            Candidate(
                model,
                resident.size_bytes,
                self.bandwidth_below(model),
                self.expected_use(model),
            )
            for model, resident in self._residents.items()
            if not self._holders.get(model)
        ]

    def _count_use(self, model: ModelName) -> None:
        self._uses[model] = self._uses.get(model, UseCount()).used(self._clock())
