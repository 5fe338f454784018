"""Nodes that serve a fleet's arrivals, with or without prefetch. A clock of events, no real time.

A node has a pool, one loader (demand before prefetch) and room for any number of replicas; a model
is up from its first request until its keep-alive ends. What makes room in the pool is what the
store does it by (`gearfall.core.tiers`), what is fetched ahead is what the scheduler wishes for
(`gearfall.scheduling.prefetching.prefetch`): both are the real rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.scheduler.forecast_fleet import Arrival
from gearfall.core.ids import ModelName, NodeId
from gearfall.core.origin import source_tier
from gearfall.core.records import ModelRecord, NodeRecord, PrefetchRecord
from gearfall.core.tiers import Candidate, UseCount, choose_victims
from gearfall.scheduling.actions import Wish
from gearfall.scheduling.prefetching.forecast import ArrivalHistory, Forecast, note_arrivals
from gearfall.scheduling.prefetching.prefetch import PrefetchPolicy, PrefetchScene, plan_prefetch


@dataclass(frozen=True, slots=True)
class Site:
    """What the fleet runs on."""

    nodes: int = 4
    pool_bytes: int = 80 * 10**9
    bytes_per_s: float = 2e9
    """From SSD, which has every model."""
    keep_alive_s: float = 60.0


@dataclass(slots=True)
class Tally:
    """What happened after the first day."""

    requests: int = 0
    starts: int = 0
    """Requests that found their model down."""
    from_pool: int = 0
    """Starts whose bytes were in the pool."""
    load_s: list[float] = field(default_factory=list)
    """Of each start: until its bytes were in the pool."""
    demand_bytes: int = 0
    prefetched: int = 0
    prefetched_bytes: int = 0
    prefetched_used: int = 0
    """Of the models prefetched, those that a start found before they left the pool."""


@dataclass(slots=True)
class _Node:
    node_id: NodeId
    resident: dict[ModelName, bool] = field(default_factory=dict)
    """Whether it was prefetched and no start has used it yet."""
    uses: dict[ModelName, UseCount] = field(default_factory=dict)
    free_at_s: float = 0.0
    """When the loader has no demand left."""
    fetching: tuple[ModelName, float] | None = None
    """(model, bytes that are left)."""
    looked_s: float = 0.0


class Replay:
    """One policy's run over one fleet."""

    def __init__(
        self,
        site: Site,
        models: Sequence[ModelRecord],
        forecast: Forecast | None,
        *,
        day_s: float,
    ) -> None:
        """`forecast`: None for no prefetch at all."""
        self.site = site
        self.models = {each.name: each for each in models}
        self.policy = None
        if forecast is not None:
            self.policy = PrefetchPolicy(forecast=forecast, season_s=day_s)
        self.day_s = day_s
        self.tally = Tally()
        self.nodes = {node_id: _Node(node_id) for node_id in models[0].nodes}
        self.up: dict[ModelName, tuple[NodeId, float]] = {}
        self.histories: dict[ModelName, ArrivalHistory] = {}
        self.wishes: dict[tuple[NodeId, ModelName], PrefetchRecord] = {}
        self._look_at_s = 0.0

    def run(self, arrivals: Sequence[Arrival]) -> Tally:
        """Play all arrivals and return what came of those after the first day."""
        for arrival in arrivals:
            while self.policy is not None and self._look_at_s <= arrival.at_s:
                self._look(self._look_at_s, self.policy)
                self._look_at_s += self.policy.every_s
            self._serve(arrival, is_counted=arrival.at_s >= self.day_s)
        return self.tally

    def _serve(self, arrival: Arrival, *, is_counted: bool) -> None:
        now_s, name = arrival.at_s, arrival.model
        # The rules take 0 for never.
        history = self.histories.get(name, ArrivalHistory())
        self.histories[name] = note_arrivals(history, 1, now_s + 1.0, season_s=self.day_s)
        self.tally.requests += is_counted
        node_id, until_s = self.up.get(name, (None, -1.0))
        load_s = 0.0
        if node_id is None or until_s <= now_s:
            node_id, load_s = self._start(name, now_s, is_counted=is_counted)
        if node_id is not None:
            self.up[name] = (node_id, now_s + load_s + self.site.keep_alive_s)

    def _start(
        self, name: ModelName, now_s: float, *, is_counted: bool
    ) -> tuple[NodeId | None, float]:
        near = [node for node in self.nodes.values() if name in node.resident]
        self.tally.starts += is_counted
        if near:
            node, load_s = near[0], 0.0
            self.tally.from_pool += is_counted
            self.tally.prefetched_used += is_counted and node.resident[name]
        else:
            loaded = self._load(name, now_s)
            if loaded is None:
                return None, 0.0
            node, load_s = loaded
            self.tally.demand_bytes += is_counted * self.models[name].size_bytes
        node.resident[name] = False
        node.uses[name] = node.uses.get(name, UseCount()).used(now_s)
        if is_counted:
            self.tally.load_s.append(load_s)
        return node.node_id, load_s

    def _load(self, name: ModelName, now_s: float) -> tuple[_Node, float] | None:
        """Bring a model up where most is free, or at all."""
        for node in sorted(self.nodes.values(), key=lambda each: (self._used(each), each.node_id)):
            if not self._make_room(node, name, now_s):
                continue
            self._fetch_on(node, now_s)
            if node.fetching is not None and node.fetching[0] == name:
                node.fetching = None
            begin_s = max(now_s, node.free_at_s)
            node.free_at_s = begin_s + self.models[name].size_bytes / self.site.bytes_per_s
            return node, node.free_at_s - now_s
        return None

    def _used(self, node: _Node) -> int:
        return sum(self.models[name].size_bytes for name in node.resident)

    def _make_room(self, node: _Node, name: ModelName, now_s: float) -> bool:
        missing = self._used(node) + self.models[name].size_bytes - self.site.pool_bytes
        if missing <= 0:
            return True
        candidates = [
            Candidate(
                each,
                self.models[each].size_bytes,
                self.site.bytes_per_s,
                node.uses.get(each, UseCount()).at(now_s),
            )
            for each in node.resident
            if not self._is_up_on(node, each, now_s)
        ]
        victims = choose_victims(candidates, missing)
        for victim in victims:
            del node.resident[victim]
        return bool(victims)

    def _is_up_on(self, node: _Node, name: ModelName, now_s: float) -> bool:
        node_id, until_s = self.up.get(name, (None, -1.0))
        return node_id == node.node_id and until_s > now_s

    def _fetch_on(self, node: _Node, now_s: float) -> None:
        """Move what the loader had time for since it was last looked at."""
        idle_s = max(0.0, now_s - max(node.looked_s, node.free_at_s))
        node.looked_s = now_s
        if node.fetching is None:
            return
        name, left_bytes = node.fetching
        left_bytes -= idle_s * self.site.bytes_per_s
        node.fetching = (name, left_bytes) if left_bytes > 0 else None
        if left_bytes <= 0 and name not in node.resident and self._make_room(node, name, now_s):
            node.resident[name] = True
            node.uses[name] = node.uses.get(name, UseCount()).used(now_s)
            is_counted = now_s >= self.day_s
            self.tally.prefetched += is_counted
            self.tally.prefetched_bytes += is_counted * self.models[name].size_bytes

    def _look(self, now_s: float, policy: PrefetchPolicy) -> None:
        for node in self.nodes.values():
            self._fetch_on(node, now_s)
        up = {name: (node_id,) for name, (node_id, until_s) in self.up.items() if until_s > now_s}
        nodes = {node_id: self._record(node) for node_id, node in self.nodes.items()}
        scene = PrefetchScene(
            self.models.get,
            nodes,
            self.wishes,
            tuple(self.models),
            lambda name: self.histories.get(name, ArrivalHistory()),
            source=lambda model, node: source_tier(model, node, nodes),
            hosting=lambda name: up.get(name, ()),
            resident=lambda name: [n for n, node in self.nodes.items() if name in node.resident],
        )
        for action in plan_prefetch(scene, policy, now_s + 1.0):
            if isinstance(action, Wish):
                wish = action.prefetch
                self.wishes[wish.node_id, wish.model] = wish
            else:
                del self.wishes[action.key]
        for node in self.nodes.values():
            self._follow_wishes(node)

    def _follow_wishes(self, node: _Node) -> None:
        wished = [model for node_id, model in self.wishes if node_id == node.node_id]
        if node.fetching is not None and node.fetching[0] not in wished:
            node.fetching = None
        missing = [name for name in wished if name not in node.resident]
        if node.fetching is None and missing:
            node.fetching = (missing[0], float(self.models[missing[0]].size_bytes))

    def _record(self, node: _Node) -> NodeRecord:
        return NodeRecord(
            node.node_id,
            address="",
            attach_socket="",
            dram_capacity_bytes=self.site.pool_bytes,
            dram_used_bytes=self._used(node),
            ssd_bytes_per_s=self.site.bytes_per_s,
            resident=tuple(node.resident),
            on_ssd=tuple(self.models),
        )
