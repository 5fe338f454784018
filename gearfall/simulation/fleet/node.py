"""A node's store in simulated time: tiers, one near and one far load at a time, eviction.

As services/store does it: a load is near when the bytes are on SSD and far else; of each kind one
runs, in the order of asking, demands before prefetches; a far load brings bytes to SSD and DRAM in
one pass; what leaves when room is needed is what costs least to bring back, never what is held.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import NodeRecord
from gearfall.core.tiers import Candidate, Tier, UseCount, choose_victims
from gearfall.simulation.agenda import Agenda
from gearfall.simulation.fleet.transfers import SharedLink, Transfer
from gearfall.simulation.site import NodeProfile

Loaded = Callable[["LoadTimes"], None]


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds that a load waited and moved bytes."""

    queued_s: float = 0.0
    remote_s: float = 0.0
    ssd_s: float = 0.0
    from_tier: Tier = Tier.DRAM


@dataclass(slots=True, eq=False)
class _Load:
    model: ModelName
    size_bytes: int
    is_far: bool
    target: Tier
    asked_s: float
    waiting: list[Loaded] = field(default_factory=list)
    left_bytes: float = 0.0
    began_s: float | None = None
    transfer: Transfer | None = None

    @property
    def is_demanded(self) -> bool:
        return bool(self.waiting)


@dataclass(slots=True)
class MovedBytes:
    """What a store has moved, by where from."""

    remote: int = 0
    ssd: int = 0
    for_prefetch: int = 0
    """Of all of these."""


class SimNode:
    """Owner of one node's tiers."""

    def __init__(
        self,
        profile: NodeProfile,
        sizes: dict[ModelName, int],
        agenda: Agenda,
        links: tuple[SharedLink, SharedLink],
        on_changed: Callable[["SimNode"], None],
    ) -> None:
        """`links`: what comes from elsewhere, shared by all nodes, and this node's SSD.

        `on_changed` is called when the node's record changed.
        """
        self.profile = profile
        self._sizes = sizes
        self._agenda = agenda
        self._remote, self._disk = links
        self._on_changed = on_changed
        self._dram: dict[ModelName, None] = dict.fromkeys(profile.in_dram)
        self._ssd: dict[ModelName, None] = dict.fromkeys(profile.on_ssd)
        self._reserved: dict[ModelName, int] = {}
        self._held: Counter[ModelName] = Counter()
        self._uses: dict[ModelName, UseCount] = {}
        self._loads: dict[ModelName, _Load] = {}
        self.moved = MovedBytes()
        self.check()

    @property
    def node_id(self) -> NodeId:
        """Of the profile."""
        return self.profile.node_id

    def record(self) -> NodeRecord:
        """What the store publishes of itself. Its bandwidths are known from the start."""
        return NodeRecord(
            node_id=self.node_id,
            address=f"{self.node_id}:1",
            attach_socket="",
            dram_capacity_bytes=self.profile.dram_bytes,
            dram_used_bytes=self.dram_used_bytes,
            ssd_bytes_per_s=self.profile.ssd_bytes_per_s,
            resident=tuple(self._dram),
            remote_bytes_per_s=self.profile.remote_bytes_per_s,
            ssd_capacity_bytes=self.profile.ssd_bytes,
            ssd_used_bytes=self.ssd_used_bytes,
            on_ssd=tuple(self._ssd),
        )

    @property
    def dram_used_bytes(self) -> int:
        """Of resident models and of those that are being loaded."""
        return sum(map(self._sizes.__getitem__, self._dram)) + sum(self._reserved.values())

    @property
    def ssd_used_bytes(self) -> int:
        """Of models on SSD."""
        return sum(map(self._sizes.__getitem__, self._ssd))

    def take(self, model: ModelName, then: Loaded) -> None:
        """Have a model in DRAM, hold it there and call `then`; one load however many ask."""
        self._uses[model] = self._uses.get(model, UseCount()).used(self._agenda.now_s)
        if model in self._dram:
            self._held[model] += 1
            then(LoadTimes())
            return
        load = self._loads.get(model) or self._ask(model, Tier.DRAM)
        load.target = Tier.DRAM
        load.waiting.append(then)
        self._start_what_may()

    def drop(self, model: ModelName, then: Loaded) -> None:
        """Take a `take` back that was not answered: the load goes on as a prefetch."""
        load = self._loads.get(model)
        if load is not None and then in load.waiting:
            load.waiting.remove(then)

    def give_back(self, model: ModelName) -> None:
        """Hold a model once less."""
        assert self._held[model] > 0
        self._held[model] -= 1
        self._start_what_may()

    def prefetch(self, model: ModelName, target: Tier) -> None:
        """Bring a model near when nothing is asked for."""
        is_there = model in self._dram or (target is Tier.SSD and model in self._ssd)
        if not is_there and model not in self._loads:
            self._ask(model, target)
            self._start_what_may()

    def cancel_prefetch(self, model: ModelName) -> None:
        """Give up a load that nobody waits for."""
        load = self._loads.get(model)
        if load is None or load.is_demanded:
            return
        self._pause(load)
        self._reserved.pop(model, None)
        del self._loads[model]

    def check(self) -> None:
        """Invariant: no tier holds more than its capacity, and what is held is resident."""
        assert self.dram_used_bytes <= self.profile.dram_bytes, f"{self.node_id}: DRAM overflows"
        assert self.ssd_used_bytes <= self.profile.ssd_bytes, f"{self.node_id}: SSD overflows"
        assert all(model in self._dram for model, count in self._held.items() if count)

    def _ask(self, model: ModelName, target: Tier) -> _Load:
        size, now_s = self._sizes[model], self._agenda.now_s
        load = _Load(model, size, model not in self._ssd, target, now_s, left_bytes=size)
        self._loads[model] = load
        return load

    def _start_what_may(self) -> None:
        any_demand = any(load.is_demanded for load in self._loads.values())
        for is_far in (False, True):
            alike = [load for load in self._loads.values() if load.is_far == is_far]
            running = next((load for load in alike if load.transfer is not None), None)
            if running is not None and (running.is_demanded or not any_demand):
                continue
            if running is not None:
                self._pause(running)
            demanded = [load for load in alike if load.is_demanded]
            for load in demanded or ([] if any_demand else alike):
                if self._begin(load):
                    break

    def _pause(self, load: _Load) -> None:
        if load.transfer is None:
            return
        link = self._remote if load.is_far else self._disk
        left = link.stop(load.transfer)
        # A near load starts over, a far one keeps what it has.
        load.left_bytes = left if load.is_far else load.size_bytes
        load.transfer = None

    def _begin(self, load: _Load) -> bool:
        """Begin to move a load's bytes; False when its tiers have no room for it now."""
        if load.target is Tier.DRAM and not self._make_dram_room(load):
            return False
        if load.is_far and not self._make_ssd_room(load):
            return False
        if load.began_s is None:
            load.began_s = self._agenda.now_s
        profile = self.profile
        link = self._remote if load.is_far else self._disk
        limit = profile.remote_bytes_per_s if load.is_far else profile.ssd_bytes_per_s
        load.transfer = link.begin(load.left_bytes, limit, lambda: self._arrived(load))
        return True

    def _make_dram_room(self, load: _Load) -> bool:
        if load.model in self._reserved:
            return True
        missing = self.dram_used_bytes + load.size_bytes - self.profile.dram_bytes
        leaving = self._victims(self._dram, missing, self.profile.ssd_bytes_per_s)
        if missing > 0 and not leaving:
            return False
        for model in leaving:
            del self._dram[model]
        self._reserved[load.model] = load.size_bytes
        return True

    def _make_ssd_room(self, load: _Load) -> bool:
        missing = self.ssd_used_bytes + load.size_bytes - self.profile.ssd_bytes
        leaving = self._victims(self._ssd, missing, self.profile.remote_bytes_per_s)
        if missing > 0 and (not leaving or not load.is_demanded):
            return False
        for model in leaving:
            del self._ssd[model]
        if leaving:
            self._on_changed(self)
        return True

    def _victims(
        self, tier: dict[ModelName, None], missing_bytes: int, bytes_per_s: float
    ) -> tuple[ModelName, ...]:
        now_s = self._agenda.now_s
        candidates = [
            Candidate(model, self._sizes[model], bytes_per_s, self._use(model, now_s))
            for model in tier
            if not self._held[model] and model not in self._loads
        ]
        return tuple(choose_victims(candidates, missing_bytes))

    def _use(self, model: ModelName, now_s: float) -> float:
        return self._uses.get(model, UseCount()).at(now_s)

    def _arrived(self, load: _Load) -> None:
        now_s = self._agenda.now_s
        assert load.began_s is not None
        spent_s = now_s - load.began_s
        times = LoadTimes(queued_s=load.began_s - load.asked_s)
        if load.is_far:
            self.moved.remote += load.size_bytes
            self._ssd[load.model] = None
            times = replace(times, remote_s=spent_s, from_tier=Tier.REMOTE)
        else:
            self.moved.ssd += load.size_bytes
            times = replace(times, ssd_s=spent_s, from_tier=Tier.SSD)
        if not load.is_demanded:
            self.moved.for_prefetch += load.size_bytes
        del self._loads[load.model]
        self._reserved.pop(load.model, None)
        if load.target is Tier.DRAM:
            self._dram[load.model] = None
            self._held[load.model] += len(load.waiting)
        self._on_changed(self)
        for then in load.waiting:
            then(times)
        self._start_what_may()
