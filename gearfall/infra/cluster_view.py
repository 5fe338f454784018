"""The cluster as one process sees it: an immutable view, and the builder that follows the watch."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

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
from gearfall.infra.cluster_keys import (
    ALL_KINDS,
    INCARNATION_KEY,
    LEADER,
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
    decisions: Mapping[ModelName, DecisionRecord] = field(default_factory=dict)
    leader: SchedulerRecord | None = None
    revision: int = 0
    """Of cluster state; 0 before the first snapshot."""


class ViewBuilder:
    """Applies watch items to a view. A value that does not decode is logged once and left out."""

    def __init__(self) -> None:
        """Start with an empty view at revision 0."""
        self.view = ClusterView()
        self._place_of_key: dict[str, tuple[str, Any]] = {}
        self._reported: dict[str, int] = {}

    def apply(self, item: WatchItem) -> frozenset[str]:
        """Take one watch item into the view and return the kinds that changed."""
        match item:
            case Snapshot():
                return self._restart(item)
            case KeyPut(entry):
                return self._put(entry)
            case KeyDeleted(key, mod_revision):
                return self._delete(key, mod_revision)

    def check(self) -> None:
        """Assert that the view holds exactly the records of the keys it has seen."""
        held = sum(
            len(getattr(self.view, f.name))
            for f in fields(self.view)
            if f.name not in {LEADER, "revision"}
        )
        held += self.view.leader is not None
        assert held == len(self._place_of_key), (held, len(self._place_of_key))

    def _restart(self, snapshot: Snapshot) -> frozenset[str]:
        tables: dict[str, dict[Any, Any]] = {kind: {} for kind in ALL_KINDS}
        places: dict[str, tuple[str, Any]] = {}
        for entry in snapshot.entries:
            decoded = self._decode(entry)
            if decoded is not None:
                kind, record_id, record = decoded
                tables[kind][record_id] = record
                places[entry.key] = (kind, record_id)
        leader = tables.pop(LEADER).get(LEADER)
        self.view = ClusterView(**tables, leader=leader, revision=snapshot.revision)
        self._place_of_key = places
        return ALL_KINDS

    def _put(self, entry: StateEntry) -> frozenset[str]:
        decoded = self._decode(entry)
        if decoded is None:
            return self._delete(entry.key, entry.mod_revision)
        kind, record_id, record = decoded
        self._place_of_key[entry.key] = (kind, record_id)
        self._replace(kind, record_id, record, entry.mod_revision)
        return frozenset((kind,))

    def _delete(self, key: str, mod_revision: int) -> frozenset[str]:
        place = self._place_of_key.pop(key, None)
        if place is None:
            self.view = replace(self.view, revision=mod_revision)
            return frozenset()
        self._replace(*place, None, mod_revision)
        return frozenset((place[0],))

    def _replace(self, kind: str, record_id: Any, record: Any, revision: int) -> None:
        if kind == LEADER:
            self.view = replace(self.view, leader=record, revision=revision)
            return
        table = dict(getattr(self.view, kind))
        if record is None:
            del table[record_id]
        else:
            table[record_id] = record
        changed: dict[str, Any] = {kind: table, "revision": revision}
        self.view = replace(self.view, **changed)

    def _decode(self, entry: StateEntry) -> tuple[str, Any, Any] | None:
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
