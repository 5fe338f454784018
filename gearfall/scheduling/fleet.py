"""The fleet as decisions need it: cluster state's records, kept record by record."""

from collections.abc import Collection, Mapping
from typing import Any

from gearfall.core.ids import WorkerId
from gearfall.scheduling.snapshot import ClusterSnapshot, on_bases, placeable

_ID_FIELDS = {
    "models": ("name",),
    "deployments": ("name",),
    "nodes": ("node_id",),
    "workers": ("worker_id",),
    "assignments": ("worker_id", "model"),
    "replicas": ("worker_id", "model"),
    "demand": ("model", "router_id"),
    "load": ("model", "router_id"),
    "moves": ("worker_id", "model"),
    "prefetch": ("node_id", "model"),
    "decisions": ("model",),
}
"""Kinds of records that decisions are made from, named as in cluster state, and what names each."""


class Fleet:
    """Owner of the records. Not safe for concurrent use; all calls return at once."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[Any, Any]] = {kind: {} for kind in _ID_FIELDS}
        self._unreachable: frozenset[WorkerId] = frozenset()
        self._awaited: dict[WorkerId, float] = {}

    @classmethod
    def of(cls, snapshot: ClusterSnapshot) -> "Fleet":
        """Return a fleet of a snapshot's records."""
        fleet = cls()
        fleet.restart(snapshot)
        return fleet

    def restart(self, snapshot: ClusterSnapshot) -> None:
        """Forget everything and begin from `snapshot`, whose models may include adapters."""
        self._tables = {kind: {} for kind in _ID_FIELDS}
        for kind in _ID_FIELDS:
            records = getattr(snapshot, kind)
            for record in records.values() if isinstance(records, Mapping) else records:
                self.put(kind, record)
        self.set_unreachable(snapshot.unreachable)
        self.set_awaited(snapshot.awaited)

    def put(self, kind: str, record: Any) -> None:
        """Note a record as it is now. Kinds that no decision depends on are ignored."""
        if kind in _ID_FIELDS:
            ids = tuple(getattr(record, field) for field in _ID_FIELDS[kind])
            self._tables[kind][ids if len(ids) > 1 else ids[0]] = record

    def remove(self, kind: str, record_id: Any) -> None:
        """Note that a record is gone; a string or a pair names it, as in the cluster's view."""
        if kind in _ID_FIELDS:
            self._tables[kind].pop(record_id, None)

    def set_unreachable(self, workers: Collection[WorkerId]) -> None:
        """Say whose connection is broken though their lease still runs."""
        self._unreachable = frozenset(workers)

    def set_awaited(self, until_unix_s: Mapping[WorkerId, float]) -> None:
        """Say which workers without a record may yet register again, and until when."""
        self._awaited = dict(until_unix_s)

    def snapshot(self) -> ClusterSnapshot:
        """Return the records as they are now."""
        tables = self._tables
        return ClusterSnapshot(
            models=placeable(tables["models"]),
            deployments=on_bases(tables["deployments"], tables["models"]),
            nodes=dict(tables["nodes"]),
            workers=dict(tables["workers"]),
            assignments=dict(tables["assignments"]),
            replicas=dict(tables["replicas"]),
            demand=tuple(tables["demand"].values()),
            decisions=dict(tables["decisions"]),
            unreachable=self._unreachable,
            awaited=dict(self._awaited),
            moves=dict(tables["moves"]),
            prefetch=dict(tables["prefetch"]),
            load=dict(tables["load"]),
        )

    def check(self) -> None:
        """Raise AssertionError unless the index is what one made anew from the records is."""
