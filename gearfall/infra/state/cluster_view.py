"""The cluster as one process sees it: an immutable view, and the builder that follows the watch."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from gearfall.core.gears.gear_records import DriftRecord, GearPlanRecord, GearVoteRecord
from gearfall.core.ids import DeploymentName, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.ports import KeyDeleted, KeyPut, Snapshot, StateEntry, WatchItem
from gearfall.core.records import (
    AssignmentRecord,
    DecisionRecord,
    DemandRecord,
    DeploymentRecord,
    LearnedRecord,
    LoadRecord,
    ModelRecord,
    MoveRecord,
    NodeRecord,
    PrefetchRecord,
    ReplicaRecord,
    RouterRecord,
    SchedulerRecord,
    WorkerRecord,
)
from gearfall.infra.state.cluster_keys import (
    ALL_KINDS,
    INCARNATION_KEY,
    LEADER,
    Record,
    UndecodableError,
    decode_entry,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Every record at one revision. Never changes: a later state is another view."""

    models: Mapping[ModelName, ModelRecord] = field(default_factory=dict)
    deployments: Mapping[DeploymentName, DeploymentRecord] = field(default_factory=dict)
    nodes: Mapping[NodeId, NodeRecord] = field(default_factory=dict)
    workers: Mapping[WorkerId, WorkerRecord] = field(default_factory=dict)
    routers: Mapping[RouterId, RouterRecord] = field(default_factory=dict)
    schedulers: Mapping[str, SchedulerRecord] = field(default_factory=dict)
    assignments: Mapping[tuple[WorkerId, ModelName], AssignmentRecord] = field(default_factory=dict)
    replicas: Mapping[tuple[WorkerId, ModelName], ReplicaRecord] = field(default_factory=dict)
    demand: Mapping[tuple[ModelName, RouterId], DemandRecord] = field(default_factory=dict)
    load: Mapping[tuple[ModelName, RouterId], LoadRecord] = field(default_factory=dict)
    moves: Mapping[tuple[WorkerId, ModelName], MoveRecord] = field(default_factory=dict)
    prefetch: Mapping[tuple[NodeId, ModelName], PrefetchRecord] = field(default_factory=dict)
    learned: Mapping[str, LearnedRecord] = field(default_factory=dict)
    gear_plans: Mapping[DeploymentName, GearPlanRecord] = field(default_factory=dict)
    gear_votes: Mapping[tuple[DeploymentName, RouterId], GearVoteRecord] = field(
        default_factory=dict
    )
    drift: Mapping[tuple[DeploymentName, str], DriftRecord] = field(default_factory=dict)
    decisions: Mapping[ModelName, DecisionRecord] = field(default_factory=dict)
    leader: SchedulerRecord | None = None
    revision: int = 0
    """Of cluster state; 0 before the first snapshot."""
    losses: int = 0
    """How often state lost its memory, and was made anew, while this process followed it."""

    def host_of(self, model: ModelName) -> ModelName:
        """Return the model in whose queue and on whose replicas its jobs are: an adapter's base."""
        record = self.models.get(model)
        return ModelName(record.base) if record is not None and record.base else model


@dataclass(frozen=True, slots=True)
class Applied:
    """What one watch item did to the view."""

    kinds: frozenset[str]
    """Of which something changed."""
    change: tuple[str, Any, Record | None] | None = None
    """(kind, id, record now); None where nothing changed, or everything may have."""
    is_restart: bool = False
    """Whether the view began anew from a snapshot."""


class ViewBuilder:
    """Applies watch items. A value that does not decode is logged once and left out.

    A table is copied when it changes after somebody has read it, and not else: many changes between
    two looks cost one copy.
    """

    def __init__(self, lasting: Collection[str] = ()) -> None:
        """Start with nothing at revision 0.

        `lasting`: kinds whose records stay in the view when state loses its memory, until somebody
        writes them again: what was registered is not unknown because a server forgot it.
        """
        self.revision = 0
        self.losses = 0
        self.kept: set[tuple[str, Any]] = set()
        """(kind, id) of records that stand in the view and no longer in cluster state."""
        self.is_loss_expected = False
        """Whether the next snapshot is known to be of another life of cluster state."""
        self._lasting = frozenset(lasting)
        self._incarnation = b""
        self._tables: dict[str, dict[Any, Any]] = {kind: {} for kind in ALL_KINDS}
        self._shared: set[str] = set()
        """Kinds whose table a view holds."""
        self._view: ClusterView | None = ClusterView()
        self._place_of_key: dict[str, tuple[str, Any]] = {}
        self._reported: dict[str, int] = {}

    @property
    def view(self) -> ClusterView:
        """Everything as of the last item, as a value that never changes."""
        if self._view is None:
            tables: dict[str, Any] = {
                kind: table for kind, table in self._tables.items() if kind != LEADER
            }
            leader = self._tables[LEADER].get(LEADER)
            self._view = ClusterView(
                **tables, leader=leader, revision=self.revision, losses=self.losses
            )
            self._shared = set(ALL_KINDS)
        return self._view

    def apply(self, item: WatchItem) -> Applied:
        """Take one watch item in and return what it changed."""
        match item:
            case Snapshot():
                return self._restart(item)
            case KeyPut(entry):
                return self._put(entry)
            case KeyDeleted(key, mod_revision):
                return self._delete(key, mod_revision)

    def forget(self, kind: str, record_id: Any) -> Applied:
        """Let a record go that was only kept: it was deleted on purpose."""
        if (kind, record_id) not in self.kept:
            return Applied(frozenset())
        self.kept.discard((kind, record_id))
        del self._own(kind)[record_id]
        self._view = None
        return Applied(frozenset((kind,)), (kind, record_id, None))

    def check(self) -> None:
        """Assert that the tables hold exactly the keys that were seen, and what was kept."""
        seen = set(self._place_of_key.values())
        assert not seen & self.kept, seen & self.kept
        held = sum(map(len, self._tables.values()))
        assert held == len(seen) + len(self.kept), (held, len(seen), len(self.kept))
        for kind, record_id in seen | self.kept:
            assert record_id in self._tables[kind], (kind, record_id)

    def _restart(self, snapshot: Snapshot) -> Applied:
        before = self._tables
        self._tables = {kind: {} for kind in ALL_KINDS}
        self._place_of_key = {}
        self._shared = set()
        for entry in snapshot.entries:
            decoded = self._decode(entry)
            if decoded is not None:
                kind, record_id, record = decoded
                self._tables[kind][record_id] = record
                self._place_of_key[entry.key] = (kind, record_id)
        self._keep_lasting(before, is_lost=self._is_lost(snapshot))
        self._move_to(snapshot.revision)
        return Applied(ALL_KINDS, is_restart=True)

    def _is_lost(self, snapshot: Snapshot) -> bool:
        """Whether this is another life of cluster state than the one that was followed."""
        named = [entry.value for entry in snapshot.entries if entry.key == INCARNATION_KEY]
        incarnation = named[0] if named else b""
        is_other = bool(self._incarnation) and incarnation != self._incarnation
        is_lost = is_other or snapshot.revision < self.revision or self.is_loss_expected
        self.is_loss_expected = False
        self._incarnation = incarnation
        self.losses += is_lost
        return is_lost

    def _keep_lasting(self, before: Mapping[str, Mapping[Any, Any]], *, is_lost: bool) -> None:
        kept = set()
        for kind in self._lasting:
            table = self._tables[kind]
            for record_id, record in before[kind].items():
                if record_id not in table and (is_lost or (kind, record_id) in self.kept):
                    table[record_id] = record
                    kept.add((kind, record_id))
        self.kept = kept

    def _put(self, entry: StateEntry) -> Applied:
        if entry.key == INCARNATION_KEY:
            self._incarnation = entry.value
        decoded = self._decode(entry)
        if decoded is None:
            return self._delete(entry.key, entry.mod_revision)
        kind, record_id, record = decoded
        self._place_of_key[entry.key] = (kind, record_id)
        self.kept.discard((kind, record_id))
        self._own(kind)[record_id] = record
        self._move_to(entry.mod_revision)
        return Applied(frozenset((kind,)), (kind, record_id, record))

    def _delete(self, key: str, mod_revision: int) -> Applied:
        place = self._place_of_key.pop(key, None)
        self._move_to(mod_revision)
        if place is None:
            return Applied(frozenset())
        kind, record_id = place
        del self._own(kind)[record_id]
        return Applied(frozenset((kind,)), (kind, record_id, None))

    def _own(self, kind: str) -> dict[Any, Any]:
        """Return the kind's table, a copy if a view holds it."""
        if kind in self._shared:
            self._shared.discard(kind)
            self._tables[kind] = dict(self._tables[kind])
        return self._tables[kind]

    def _move_to(self, revision: int) -> None:
        self.revision = revision
        self._view = None

    def _decode(self, entry: StateEntry) -> tuple[str, Any, Record] | None:
        if entry.key == INCARNATION_KEY:
            return None
        try:
            return decode_entry(entry.key, entry.value)
        except UndecodableError as error:
            if self._reported.get(entry.key) != entry.mod_revision:
                self._reported[entry.key] = entry.mod_revision
                _log.warning(
                    "left out a record that does not decode",
                    extra={"key": entry.key, "error": str(error)},
                )
            return None
