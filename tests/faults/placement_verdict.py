"""Judges what became of a cluster's assignments, from the changes of its state in order.

What is looked at:

    a fenced record is written while somebody leads, and under that leader's fence
    an assignment is written for a (worker, model) that has none
    what a worker hosts, leaving replicas included, never exceeds what it has
    a model has no more replicas than it may have, but for one more while one of them moves
    who waits for a model is served in the end

A worker that is out of reach, gone or draining, and a replica that does not start, do not count:
their models are started elsewhere while their records still stand.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gearfall.core.generation.history import ProcessHistory, Refused, Wrote
from gearfall.core.ids import ModelName, RouterId, WorkerId
from gearfall.core.records import (
    AssignmentRecord,
    DeploymentRecord,
    ReplicaRecord,
    ReplicaState,
    WorkerRecord,
)

FENCED = frozenset({"assignments", "moves", "prefetch", "learned", "decisions"})
_FAILURES_TO_MOVE = 2

_Key = tuple[WorkerId, ModelName]


@dataclass(frozen=True, slots=True)
class StateChange:
    """One record as cluster state showed it."""

    revision: int
    kind: str
    record_id: Any
    """A string, or a pair for kinds with two id fields."""
    record: Any
    """None: it was deleted."""
    create_revision: int = 0
    """Of the key: what its leader's fence is, for the key `leader`."""
    at_unix_s: float = 0.0
    """When it was seen."""


@dataclass(frozen=True, slots=True)
class StateListed:
    """Everything there was at a revision: the beginning, or after data or history were lost."""

    revision: int
    records: tuple[StateChange, ...]


@dataclass(frozen=True, slots=True)
class PlacementVerdict:
    """What the leaders of a run kept and what they broke."""

    terms: int
    """Times that somebody began to lead."""
    assignments: int
    """Written."""
    demands: int
    """Models that a router waited for, each time that it began to."""
    longest_wait_s: float
    """From such a beginning until a replica was ready."""
    refused: int
    """Writes of deposed leaders that met another's fence."""
    breaches: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was broken."""
        return not self.breaches


def judge_placement(
    changes: Iterable[StateChange | StateListed],
    histories: Sequence[ProcessHistory] = (),
    *,
    struck: frozenset[WorkerId] = frozenset(),
) -> PlacementVerdict:
    """Return the verdict. `struck`: workers that somebody put out of reach on the way."""
    events = [event for history in histories for event in history.events]
    wrote: dict[tuple[int, str, str], set[int]] = {}
    for event in events:
        if isinstance(event, Wrote) and event.revision:
            wrote.setdefault((event.revision, event.kind, event.key), set()).add(event.fence)
    run = _Run(struck, wrote)
    for change in changes:
        if isinstance(change, StateListed):
            run.begin_anew(change)
        else:
            run.follow(change)
    run.judge_end()
    return PlacementVerdict(
        terms=run.terms,
        assignments=run.assigned,
        demands=run.demands,
        longest_wait_s=max(run.waits_s, default=0.0),
        refused=sum(isinstance(event, Refused) for event in events),
        breaches=tuple(run.breaches),
    )


@dataclass(slots=True)
class _Run:
    """The state as it was after each change, and what was counted on the way."""

    struck: frozenset[WorkerId]
    wrote: Mapping[tuple[int, str, str], set[int]]
    tables: dict[str, dict[Any, Any]] = field(default_factory=dict)
    fence: int = 0
    """Of whoever leads; 0 while nobody does."""
    waiting: dict[tuple[ModelName, RouterId], float] = field(default_factory=dict)
    """Since when each open demand waits."""
    terms: int = 0
    assigned: int = 0
    demands: int = 0
    waits_s: list[float] = field(default_factory=list)
    breaches: list[str] = field(default_factory=list)

    def begin_anew(self, listed: StateListed) -> None:
        self.tables = {}
        self._lead(0)
        for each in listed.records:
            self.tables.setdefault(each.kind, {})[each.record_id] = each.record
            if each.kind == "leader":
                self._lead(each.create_revision)

    def follow(self, change: StateChange) -> None:
        table = self.tables.setdefault(change.kind, {})
        if change.kind in FENCED:
            self._judge_fence(change)
        if change.kind == "assignments" and change.record is not None:
            self._judge_assignment(change.record_id, change.record)
        if change.record is None:
            table.pop(change.record_id, None)
        else:
            table[change.record_id] = change.record
        if change.kind == "leader":
            self._lead(change.create_revision if change.record is not None else 0)
        self._follow_demand(change)

    def judge_end(self) -> None:
        for model, router in sorted(self.waiting):
            if not self._is_ready(model):
                self.breaches.append(f"{router} waits for {model}, and nothing serves it")

    def _lead(self, fence: int) -> None:
        self.terms += fence not in (0, self.fence)
        self.fence = fence

    def _judge_fence(self, change: StateChange) -> None:
        ids = change.record_id
        key = "/".join(ids) if isinstance(ids, tuple) else ids
        what = f"{change.kind}/{key} at revision {change.revision}"
        fences = self.wrote.get((change.revision, change.kind, key))
        if not self.fence:
            self.breaches.append(f"{what} was written while nobody led")
        elif fences is not None and self.fence not in fences:
            self.breaches.append(f"{what} was written under {fences}, {self.fence} led")

    def _judge_assignment(self, key: _Key, record: AssignmentRecord) -> None:
        self.assigned += 1
        worker_id, model = key
        if key in self._table("assignments"):
            self.breaches.append(f"{model} was assigned twice to {worker_id}")
            return
        worker = self._table("workers").get(worker_id)
        if isinstance(worker, WorkerRecord):
            self._judge_room(worker, model, record)
        most = self._most_replicas(model) + self._moves_of(model)
        if len(self._groups(model, key, record)) > most:
            self.breaches.append(f"{model} was assigned to {worker_id} beyond its {most} replicas")

    def _judge_room(self, worker: WorkerRecord, model: ModelName, record: AssignmentRecord) -> None:
        hosted: dict[ModelName, int] = {model: record.memory_bytes}
        for table in ("assignments", "replicas"):
            for (worker_id, name), each in self._table(table).items():
                if worker_id == worker.worker_id:
                    hosted[name] = max(hosted.get(name, 0), each.memory_bytes)
        if len(hosted) > worker.max_replicas:
            self.breaches.append(
                f"{model} was the replica {len(hosted)} of {worker.max_replicas} on "
                f"{worker.worker_id}"
            )
        used = sum(hosted.values())
        if used > worker.memory_bytes:
            self.breaches.append(
                f"{model} made {used} bytes of {worker.memory_bytes} on {worker.worker_id}"
            )

    def _groups(self, model: ModelName, key: _Key, record: AssignmentRecord) -> set[WorkerId]:
        """Who runs the engine of each replica that counts, the new one included."""
        assignments = {**self._table("assignments"), key: record}
        return {
            each.group[0] if each.group else worker_id
            for (worker_id, name), each in assignments.items()
            if name == model and self._counts(worker_id, name)
        }

    def _counts(self, worker_id: WorkerId, model: ModelName) -> bool:
        worker = self._table("workers").get(worker_id)
        if worker is None or worker.max_replicas < 1 or worker_id in self.struck:
            return False
        replica = self._table("replicas").get((worker_id, model))
        return not isinstance(replica, ReplicaRecord) or not (
            replica.failures >= _FAILURES_TO_MOVE or replica.state is ReplicaState.DRAINING
        )

    def _most_replicas(self, model: ModelName) -> int:
        deployments: Iterable[DeploymentRecord] = self._table("deployments").values()
        named = [
            max(each.max_replicas, each.min_replicas)
            for each in deployments
            if any(stage.model == model for stage in each.stages)
        ]
        return max(named, default=1)

    def _moves_of(self, model: ModelName) -> int:
        return sum(name == model for _, name in self._table("moves"))

    def _follow_demand(self, change: StateChange) -> None:
        record = change.record
        if change.kind == "demand" and record is None:
            self.waiting.pop(change.record_id, None)
        elif change.kind == "demand" and change.record_id not in self.waiting:
            self.demands += 1
            self.waiting[change.record_id] = change.at_unix_s
        elif isinstance(record, ReplicaRecord) and record.state is ReplicaState.READY:
            self._serve(record.model, change.at_unix_s)

    def _serve(self, model: ModelName, at_unix_s: float) -> None:
        served = [key for key in self.waiting if key[0] == model]
        self.waits_s += [at_unix_s - self.waiting.pop(key) for key in served]

    def _is_ready(self, model: ModelName) -> bool:
        replicas: Iterable[ReplicaRecord] = self._table("replicas").values()
        return any(each.model == model and each.state is ReplicaState.READY for each in replicas)

    def _table(self, kind: str) -> dict[Any, Any]:
        return self.tables.get(kind, {})
