"""How records lie in cluster state: one kind a key pattern, values as JSON.

models/<name>                       ModelRecord
deployments/<name>                  DeploymentRecord
nodes/<node_id>                     NodeRecord        lease of the store
workers/<worker_id>                 WorkerRecord      lease of the worker
routers/<router_id>                 RouterRecord      lease of the router
schedulers/<scheduler_id>           SchedulerRecord   lease of the scheduler
assignments/<worker_id>/<model>     AssignmentRecord  fenced
replicas/<worker_id>/<model>        ReplicaRecord     lease of the worker
demand/<model>/<router_id>          DemandRecord      lease of the router
load/<model>/<router_id>            LoadRecord        lease of the router
moves/<worker_id>/<model>           MoveRecord        fenced
prefetch/<node_id>/<model>          PrefetchRecord    fenced
learned/<subject>                   LearnedRecord     fenced
gear_plans/<deployment>             GearPlanRecord
gear_votes/<deployment>/<router_id> GearVoteRecord    lease of the router
drift/<deployment>/<cascade>        DriftRecord
decisions/<model>                   DecisionRecord    fenced
leader                              SchedulerRecord   lease of the leader
incarnation                         (text)            names one life of cluster state; no record
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_records import DriftRecord, GearPlanRecord, GearVoteRecord
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

Record = (
    ModelRecord
    | DeploymentRecord
    | NodeRecord
    | WorkerRecord
    | RouterRecord
    | SchedulerRecord
    | AssignmentRecord
    | ReplicaRecord
    | DemandRecord
    | LoadRecord
    | MoveRecord
    | PrefetchRecord
    | LearnedRecord
    | GearPlanRecord
    | GearVoteRecord
    | DriftRecord
    | DecisionRecord
)

LEADER = "leader"
LEADER_KEY = "leader"
"""The key whose create_revision is the election revision: the leader's fence."""

INCARNATION_KEY = "incarnation"
"""Written once, by whoever asks first; another value means that state was made anew."""


class UndecodableError(ValueError):
    """The bytes under a key are not the record that the key promises."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of record: its directory and the fields that make its key, in order."""

    name: str
    record_type: type[Record]
    id_fields: tuple[str, ...]


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("models", ModelRecord, ("name",)),
        Kind("deployments", DeploymentRecord, ("name",)),
        Kind("nodes", NodeRecord, ("node_id",)),
        Kind("workers", WorkerRecord, ("worker_id",)),
        Kind("routers", RouterRecord, ("router_id",)),
        Kind("schedulers", SchedulerRecord, ("scheduler_id",)),
        Kind("assignments", AssignmentRecord, ("worker_id", "model")),
        Kind("replicas", ReplicaRecord, ("worker_id", "model")),
        Kind("demand", DemandRecord, ("model", "router_id")),
        Kind("load", LoadRecord, ("model", "router_id")),
        Kind("moves", MoveRecord, ("worker_id", "model")),
        Kind("prefetch", PrefetchRecord, ("node_id", "model")),
        Kind("learned", LearnedRecord, ("subject",)),
        Kind("gear_plans", GearPlanRecord, ("name",)),
        Kind("gear_votes", GearVoteRecord, ("name", "router_id")),
        Kind("drift", DriftRecord, ("name", "cascade")),
        Kind("decisions", DecisionRecord, ("model",)),
    )
}

ALL_KINDS = frozenset(KINDS) | {LEADER}


def key_of(kind: str, *ids: str) -> str:
    """Return the key of the record with these ids; InvalidRequest on an id with a slash."""
    for part in ids:
        if not part or "/" in part or "\0" in part:
            raise InvalidRequest(f"{part!r} can't be part of a cluster state key", param="id")
    return "/".join((kind, *ids))


def key_of_record(kind: str, record: Record) -> str:
    """Return the key that a record of this kind belongs under."""
    return key_of(kind, *(getattr(record, field) for field in KINDS[kind].id_fields))


def encode_record(record: Record) -> bytes:
    """Return the JSON of a record; InvalidRequest on a number that JSON can't carry."""
    fields = msgspec.to_builtins(record)
    if _has_non_finite(fields):
        raise InvalidRequest(f"a {type(record).__name__} must hold finite numbers only")
    return msgspec.json.encode(fields)


def decode_entry(key: str, value: bytes) -> tuple[str, Any, Record]:
    """Return (kind, id, record); the id is a string, or a pair for kinds with two id fields.

    Raises UndecodableError on an unknown key, bytes that are no such record, or a record that
    belongs under another key.
    """
    if key == LEADER_KEY:
        return LEADER, LEADER, _decode(value, SchedulerRecord)
    kind = KINDS.get(key.partition("/")[0])
    if kind is None:
        raise UndecodableError("unknown kind of key")
    record = _decode(value, kind.record_type)
    ids = tuple(getattr(record, field) for field in kind.id_fields)
    if "/".join((kind.name, *ids)) != key:
        raise UndecodableError("the record belongs under another key")
    return kind.name, ids[0] if len(ids) == 1 else ids, record


def _decode(value: bytes, record_type: type[Record]) -> Record:
    try:
        return msgspec.json.decode(value, type=record_type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UndecodableError(str(error)) from error


def _has_non_finite(value: object) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(_has_non_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_has_non_finite(item) for item in value)
    return False
