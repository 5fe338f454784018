"""Indices over the fleet's records that need neither policy nor time: who hosts, who has bytes."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from gearfall.core.ids import DeploymentName, ModelName, NodeId, RouterId, WorkerId, is_url
from gearfall.core.records import (
    AssignmentRecord,
    DemandRecord,
    DeploymentRecord,
    LoadRecord,
    ModelRecord,
    MoveRecord,
    NodeRecord,
    ReplicaRecord,
    ReplicaState,
    WorkerRecord,
)
from gearfall.core.tiers import Tier
from gearfall.scheduling.snapshot import Hosted, ReplicaKey, Waiting, waiting_by_model

Key = TypeVar("Key")
Value = TypeVar("Value")


class FleetIndex:
    """Owner of the indices; `note_*` gets a record as it was and as it is, None for none."""

    def __init__(self) -> None:
        self.hosted: dict[ModelName, dict[ReplicaKey, Hosted]] = {}
        """Assignments by model, each with its replica if there is one."""
        self.holders: dict[ModelName, set[WorkerId]] = {}
        """Workers where a model is assigned or still there."""
        self.held: dict[WorkerId, set[ModelName]] = {}
        """The other way round."""
        self.loading: set[ReplicaKey] = set()
        """Assigned, and not known to have its bytes in memory."""
        self.workers: dict[NodeId, set[WorkerId]] = {}
        """Live workers by node."""
        self.demand: dict[ModelName, dict[RouterId, DemandRecord]] = {}
        self.waiting: dict[ModelName, Waiting] = {}
        """The demand of all routers together."""
        self.hinted: set[ModelName] = set()
        """Models that drafts on their way are likely to ask for."""
        self.load: dict[ModelName, dict[RouterId, LoadRecord]] = {}
        self.deployments: dict[ModelName, set[DeploymentName]] = {}
        """By the models of their stages as they name them, adapters included."""
        self.adapters: dict[ModelName, set[ModelName]] = {}
        """By base."""
        self.resident: dict[ModelName, set[NodeId]] = {}
        self.on_ssd: dict[ModelName, set[NodeId]] = {}
        self.silent: set[NodeId] = set()
        """Nodes that do not say what they have on SSD."""
        self.listed: dict[ModelName, frozenset[NodeId]] = {}
        """Nodes that a model's record names."""
        self.moves: dict[ModelName, set[ReplicaKey]] = {}
        """Moves by the model that moves and by the one that they make room for."""
        self.arriving: dict[ReplicaKey, set[ReplicaKey]] = {}
        """Moves by where they lead: (target, model)."""

    def note_model(self, before: ModelRecord | None, now: ModelRecord | None) -> None:
        """A registered model, an adapter or not."""
        if before is not None:
            self.listed.pop(before.name, None)
            if before.base:
                _discard(self.adapters, ModelName(before.base), before.name)
        if now is not None:
            self.listed[now.name] = frozenset(now.nodes)
            if now.base:
                self.adapters.setdefault(ModelName(now.base), set()).add(now.name)

    def note_deployment(
        self, before: DeploymentRecord | None, now: DeploymentRecord | None
    ) -> None:
        """A deployment."""
        for stage in before.stages if before else ():
            _discard(self.deployments, stage.model, before.name if before else DeploymentName(""))
        for stage in now.stages if now else ():
            self.deployments.setdefault(stage.model, set()).add(
                now.name if now else DeploymentName("")
            )

    def note_node(self, before: NodeRecord | None, now: NodeRecord | None) -> set[ModelName]:
        """A store; returns the models that it has now and had not, or the other way round."""
        node_id = (now or before).node_id  # type: ignore[union-attr]
        changed = _note_members(self.resident, node_id, _resident(before), _resident(now))
        changed |= _note_members(self.on_ssd, node_id, _on_ssd(before), _on_ssd(now))
        self.silent.discard(node_id)
        if now is not None and now.on_ssd is None:
            self.silent.add(node_id)
        return changed

    def note_worker(self, before: WorkerRecord | None, now: WorkerRecord | None) -> None:
        """A live worker."""
        if before is not None:
            _discard(self.workers, before.node_id, before.worker_id)
        if now is not None:
            self.workers.setdefault(now.node_id, set()).add(now.worker_id)

    def note_hosting(
        self, key: ReplicaKey, assignment: AssignmentRecord | None, replica: ReplicaRecord | None
    ) -> None:
        """An assignment, its replica, or what is left of either."""
        worker_id, model = key
        self.loading.discard(key)
        if assignment and (replica is None or replica.state is ReplicaState.LOADING):
            self.loading.add(key)
        if assignment is not None:
            self.hosted.setdefault(model, {})[key] = Hosted(assignment, replica)
        elif model in self.hosted:
            self.hosted[model].pop(key, None)
            if not self.hosted[model]:
                del self.hosted[model]
        if assignment is None and replica is None:
            _discard(self.holders, model, worker_id)
            _discard(self.held, worker_id, model)
        else:
            self.holders.setdefault(model, set()).add(worker_id)
            self.held.setdefault(worker_id, set()).add(model)

    def note_demand(self, model: ModelName, router: RouterId, now: DemandRecord | None) -> None:
        """What waits at one router."""
        _note_item(self.demand, model, router, now)
        records = tuple(self.demand.get(model, {}).values())
        if any(each.hinted_jobs > 0 for each in records):
            self.hinted.add(model)
        else:
            self.hinted.discard(model)
        waiting = waiting_by_model(records)
        if model in waiting:
            self.waiting[model] = waiting[model]
        else:
            self.waiting.pop(model, None)

    def note_load(self, model: ModelName, router: RouterId, now: LoadRecord | None) -> None:
        """What came to one router."""
        _note_item(self.load, model, router, now)

    def note_move(self, before: MoveRecord | None, now: MoveRecord | None) -> None:
        """A replica under way."""
        for move in (before,) if before else ():
            key = (move.worker_id, move.model)
            _discard(self.moves, move.model, key)
            _discard(self.moves, move.for_model, key)
            _discard(self.arriving, (move.target, move.model), key)
        for move in (now,) if now else ():
            key = (move.worker_id, move.model)
            self.moves.setdefault(move.model, set()).add(key)
            self.moves.setdefault(move.for_model, set()).add(key)
            self.arriving.setdefault((move.target, move.model), set()).add(key)

    def is_elsewhere(
        self, model: ModelRecord, node_id: NodeId, nodes: Mapping[NodeId, NodeRecord]
    ) -> bool:
        """Whether a node could get the model's bytes from a URL or another live node."""
        return is_url(model.source) or any(n in nodes for n in model.nodes if n != node_id)

    def source_tier(
        self, model: ModelRecord, node_id: NodeId, nodes: Mapping[NodeId, NodeRecord]
    ) -> Tier | None:
        """Return what `gearfall.core.origin.source_tier` does, without walking the node's lists."""
        name = model.name
        is_resident = node_id in self.resident.get(name, ())
        is_named = is_resident or node_id in self.on_ssd.get(name, ())
        if node_id not in self.listed.get(name, ()):
            reachable = not is_named and self.is_elsewhere(model, node_id, nodes)
            return Tier.REMOTE if reachable else None
        if is_resident:
            return Tier.DRAM
        if is_named or node_id in self.silent or not self.is_elsewhere(model, node_id, nodes):
            return Tier.SSD
        return Tier.REMOTE

    def nodes_out_of_line(
        self, model: ModelRecord, nodes: Mapping[NodeId, NodeRecord]
    ) -> set[NodeId]:
        """Return the nodes whose tier is not what it is on any node that knows nothing of it."""
        name, listed = model.name, self.listed.get(model.name, frozenset())
        special = self.resident.get(name, set()) | self.on_ssd.get(name, set())
        special |= self.silent & listed
        if not is_url(model.source):
            live = [n for n in model.nodes if n in nodes]
            special |= set(live) if len(live) == 1 else set()
        return special


def _resident(node: NodeRecord | None) -> Iterable[ModelName]:
    return node.resident if node else ()


def _on_ssd(node: NodeRecord | None) -> Iterable[ModelName]:
    return (node.on_ssd or ()) if node else ()


def _note_members(
    index: dict[ModelName, set[NodeId]],
    node_id: NodeId,
    before: Iterable[ModelName],
    now: Iterable[ModelName],
) -> set[ModelName]:
    if before is now:
        return set()
    old, new = set(before), set(now)
    for name in old - new:
        _discard(index, name, node_id)
    for name in new - old:
        index.setdefault(name, set()).add(node_id)
    return old ^ new


def _note_item(
    index: dict[ModelName, dict[RouterId, Value]],
    model: ModelName,
    router: RouterId,
    now: Value | None,
) -> None:
    if now is not None:
        index.setdefault(model, {})[router] = now
    elif model in index:
        index[model].pop(router, None)
        if not index[model]:
            del index[model]


def _discard(index: dict[Key, set[Value]], key: Key, value: Value) -> None:
    values = index.get(key)
    if values is not None:
        values.discard(value)
        if not values:
            del index[key]
