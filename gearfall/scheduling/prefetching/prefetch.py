"""Which models a node should have near before anybody asks: expected use x time it saves.

A model is worth `probability of use within the horizon x seconds that its bytes take to the pool`.
One that a draft on its way is likely to ask for is taken as certain to be used.
Models are taken by what each of their bytes is worth. One goes to the node it gets to soonest, into
room that is free or held by models that nobody maps and that are worth less than a share of it a
byte; where the pool has none but the bytes are far away, to the node's SSD. What is up somewhere or
in some node's pool already is left alone: its next start is quick without a wish.

A wish is taken back when it is fulfilled (what is there stays until the store needs the room), when
it is worth less than a share of what a new one has to be, when its model is up on that node, when
it was not fulfilled in time, or when its model or its node is gone.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from zlib import crc32

from gearfall.core.ids import ModelName, NodeId
from gearfall.core.origin import bandwidth_out_of
from gearfall.core.records import ModelRecord, NodeRecord, PrefetchRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.actions import Unwish, Wish
from gearfall.scheduling.prefetching.forecast import (
    DAY_S,
    ArrivalHistory,
    Forecast,
    use_probability,
)

WishKey = tuple[NodeId, ModelName]

NODES_EXAMINED = 8
"""Of a model's nodes, at most so many are looked at for one wish, beginning anywhere."""


@dataclass(frozen=True, slots=True)
class PrefetchPolicy:
    """When it is worth to fetch ahead."""

    forecast: Forecast = Forecast.BLEND
    horizon_s: float = 300.0
    """A use within this time counts."""
    season_s: float = DAY_S
    every_s: float = 10.0
    """Pause between two looks."""
    least_gain_s: float = 0.05
    """Expected seconds saved below which nothing is fetched."""
    least_use: float = 0.2
    """Probability of use below which nothing is fetched."""
    displaces_below: float = 0.5
    """A model may take the room of others worth less than this share of it, a byte."""
    keeps_above: float = 0.5
    """A wish stands while it is worth this share of what a new one has to be."""
    most_pending: int = 2
    """Wishes of one node at once; each is taken back when it is fulfilled."""
    patience_s: float = 120.0
    """After which a wish that was not fulfilled is taken back."""
    most_wishes: int = 16
    """New ones of one look."""
    most_standing: int = 256
    """Of all nodes together."""
    most_models: int = 64
    """That are looked at in one look; with more of them looks come more often, so that each model
    has its turn every `every_s`."""


@dataclass(frozen=True, slots=True)
class PrefetchScene:
    """What the decision is made from; nothing of it changes meanwhile."""

    model: Callable[[ModelName], ModelRecord | None]
    """A model that may have replicas; None for any other name."""
    nodes: Mapping[NodeId, NodeRecord]
    wishes: Mapping[WishKey, PrefetchRecord]
    candidates: Collection[ModelName]
    """Models to look at this time; wishes for others stand, but for what is gone."""
    history: Callable[[ModelName], ArrivalHistory]
    """When jobs came for a model; the empty one for a model nobody asked for."""
    source: Callable[[ModelRecord, NodeRecord], Tier | None]
    """Where the bytes of a start on a node would come from; None if they can't."""
    hosting: Callable[[ModelName], Collection[NodeId]]
    """Nodes on which a worker has or gets a replica."""
    resident: Callable[[ModelName], Collection[NodeId]]
    """Nodes that have a model in their pool, as their records say."""
    hinted: Collection[ModelName] = ()
    """Models that drafts on their way are likely to ask for."""
    waiting: Collection[ModelName] = ()
    """Models that somebody waits for: their bytes go where their place will be."""
    placed: Collection[ModelName] = ()
    """Of those, the ones of which it is known where that is."""


def plan_prefetch(
    scene: PrefetchScene, policy: PrefetchPolicy, now_unix_s: float
) -> tuple[Wish | Unwish, ...]:
    """Return the wishes to write and to take back now. Nothing is wished for twice."""
    look = _Look(scene, policy, now_unix_s)
    look.take_back()
    look.wish()
    return (*look.unwishes, *look.wishes)


class _Look:
    """Working state of one call of `plan_prefetch`."""

    def __init__(self, scene: PrefetchScene, policy: PrefetchPolicy, now_unix_s: float) -> None:
        self.scene = scene
        self.policy = policy
        self.now_unix_s = now_unix_s
        self.unwishes: list[Unwish] = []
        self.wishes: list[Wish] = []
        self._uses: dict[ModelName, float] = {}
        self.standing: dict[WishKey, Tier] = {}
        self.standing_on: Counter[NodeId] = Counter()
        self.displaced: dict[NodeId, set[ModelName]] = {}
        self.taken_bytes: dict[tuple[NodeId, Tier], int] = {}

    def use(self, name: ModelName) -> float:
        """Return how likely a model is wanted within the horizon."""
        if name in self.scene.hinted or name in self.scene.waiting:
            return 1.0
        known = self._uses.get(name)
        if known is None:
            known = self._uses[name] = use_probability(
                self.scene.history(name),
                self.policy.forecast,
                self.policy.horizon_s,
                self.now_unix_s,
                season_s=self.policy.season_s,
            )
        return known

    def take_back(self) -> None:
        """Decide which of the present wishes stand."""
        candidates = frozenset(self.scene.candidates)
        for key, record in sorted(self.scene.wishes.items()):
            reason = self._what_is_gone(record)
            if not reason and record.model in candidates:
                reason = self._why_not(record, self.scene.nodes[record.node_id])
            if reason:
                self.unwishes.append(Unwish(key, reason))
            else:
                self._count(key, record.tier)

    def wish(self) -> None:
        """Add wishes, of the models whose bytes are worth most first."""
        wished = {model for _, model in self.standing}
        found = [
            name
            for name in self.scene.candidates
            if self.scene.model(name) is not None
            and self.use(name) >= self.policy.least_use
            and name not in wished
            and not self._comes_to_its_place(name)
            and not self.scene.resident(name)
            and not self.scene.hosting(name)
        ]
        for name in sorted(found, key=lambda each: (-self.use(each), each)):
            is_full = len(self.standing) >= self.policy.most_standing
            if is_full or len(self.wishes) >= self.policy.most_wishes:
                return
            self._wish_for(self._known(name))

    def _comes_to_its_place(self, name: ModelName) -> bool:
        """Whether a model waits and its bytes go only where its place is; a hint is for before."""
        if name not in self.scene.waiting:
            return False
        return name not in self.scene.hinted or name in self.scene.placed

    def _known(self, name: ModelName) -> ModelRecord:
        model = self.scene.model(name)
        assert model is not None, "only what may have replicas is looked at"
        return model

    def _what_is_gone(self, record: PrefetchRecord) -> str:
        if self.scene.model(record.model) is None:
            return "model is gone"
        return "" if record.node_id in self.scene.nodes else "node is gone"

    def _why_not(self, record: PrefetchRecord, node: NodeRecord) -> str:
        if node.node_id in self.scene.hosting(record.model):
            return "has a replica there"
        if _has(node, record.model, record.tier):
            return "is there"
        use = self.use(record.model)
        if use < self.policy.keeps_above * self.policy.least_use:
            return f"{use:.0%} likely to be wanted within {self.policy.horizon_s:g} s"
        is_late = record.wished_unix_s + self.policy.patience_s <= self.now_unix_s
        return "was not brought in time" if is_late else ""

    def _wish_for(self, model: ModelRecord) -> None:
        """Wish for one model where it gets to soonest, if anywhere has room for it."""
        offers = []
        for node_id in self._nodes_for(model):
            node = self.scene.nodes[node_id]
            source = self.scene.source(model, node)
            if source in {Tier.SSD, Tier.REMOTE} and self._may_take(node_id):
                saved_s = model.size_bytes / bandwidth_out_of(source, node).bytes_per_s
                tier = self._tier_with_room(model, node, source)
                if tier is not None and self.use(model.name) * saved_s >= self.policy.least_gain_s:
                    offers.append((tier is Tier.SSD, saved_s, -_free_bytes(node), node_id, tier))
        if offers:
            _, saved_s, _, node_id, tier = min(offers)
            self._add(model, node_id, tier, saved_s)

    def _nodes_for(self, model: ModelRecord) -> Iterator[NodeId]:
        """Yield live nodes that can load it from near, else any; other models begin elsewhere."""
        near = any(each in self.scene.nodes for each in model.nodes)
        names = model.nodes if near else tuple(self.scene.nodes)
        begin = crc32(model.name.encode()) % max(1, len(names))
        turned = chain(islice(names, begin, None), islice(names, begin))
        return islice((each for each in turned if each in self.scene.nodes), NODES_EXAMINED)

    def _may_take(self, node_id: NodeId) -> bool:
        return self.standing_on[node_id] < self.policy.most_pending

    def _tier_with_room(
        self, model: ModelRecord, node: NodeRecord, source: Tier | None
    ) -> Tier | None:
        if self._displaceable(model, node) is not None:
            return Tier.DRAM
        taken = self.taken_bytes.get((node.node_id, Tier.SSD), 0)
        free_bytes = node.ssd_capacity_bytes - node.ssd_used_bytes - taken
        is_far = source is Tier.REMOTE and model.name not in (node.on_ssd or ())
        return Tier.SSD if is_far and model.size_bytes <= free_bytes else None

    def _displaceable(self, model: ModelRecord, node: NodeRecord) -> list[ModelName] | None:
        """Return what would have to go for the model, least likely first; None if too little."""
        missing = model.size_bytes - _free_bytes(node)
        missing += self.taken_bytes.get((node.node_id, Tier.DRAM), 0)
        if missing <= 0:
            return []
        gone = []
        for name in sorted(node.resident, key=lambda each: (self.use(each), each)):
            other = self.scene.model(name)
            if other is None or not self._may_go(name, node, self.use(model.name)):
                continue
            gone.append(name)
            missing -= other.size_bytes
            if missing <= 0:
                return gone
        return None

    def _may_go(self, name: ModelName, node: NodeRecord, use: float) -> bool:
        is_held = node.node_id in self.scene.hosting(name)
        is_promised = name in self.displaced.get(node.node_id, ())
        is_less = self.use(name) < self.policy.displaces_below * use
        return is_less and not (is_held or is_promised)

    def _add(self, model: ModelRecord, node_id: NodeId, tier: Tier, saved_s: float) -> None:
        node, use = self.scene.nodes[node_id], self.use(model.name)
        gone = (self._displaceable(model, node) or []) if tier is Tier.DRAM else []
        self.displaced.setdefault(node_id, set()).update(gone)
        freed = sum(self._known(each).size_bytes for each in gone)
        self._count((node_id, model.name), tier)
        place = (node_id, tier)
        self.taken_bytes[place] = self.taken_bytes.get(place, 0) - freed
        reason = f"{use:.0%} likely to be wanted within {self.policy.horizon_s:g} s"
        if model.name in self.scene.hinted:
            reason = "a draft is likely to ask for it"
        reason += f", which saves {saved_s:.2f} s"
        reason += f"; instead of {', '.join(gone)}" if gone else ""
        record = PrefetchRecord(node_id, model.name, tier, reason, self.now_unix_s)
        self.wishes.append(Wish(record))

    def _count(self, key: WishKey, tier: Tier) -> None:
        """Let a wish stand and take the room that it is to fill."""
        node_id, name = key
        self.standing[key] = tier
        self.standing_on[node_id] += 1
        size_bytes = self._known(name).size_bytes
        self.taken_bytes[node_id, tier] = self.taken_bytes.get((node_id, tier), 0) + size_bytes


def _free_bytes(node: NodeRecord) -> int:
    return node.dram_capacity_bytes - node.dram_used_bytes


def _has(node: NodeRecord, model: ModelName, tier: Tier) -> bool:
    return model in (node.resident if tier is Tier.DRAM else (node.on_ssd or ()))
