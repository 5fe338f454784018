"""The fleet as decisions need it: records put one by one, and an index that follows each of them.

`put` and `remove` only note what a change touches; `refresh` brings the rows of the touched workers
up to date, as some of their numbers depend on the policy and on time.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.scheduling.fleet.fleet_changes import note_change
from gearfall.scheduling.fleet.fleet_records import ID_FIELDS, id_of
from gearfall.scheduling.fleet.fleet_rows import NodeFigures, node_figures, row_of
from gearfall.scheduling.fleet.fleet_state import FleetState, ModelFlags
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.snapshot import ClusterSnapshot, on_bases, placeable


class Fleet(FleetState):
    """Owner of records and index. Not safe for concurrent use; every call returns at once."""

    def __init__(self) -> None:
        super().__init__()
        self._has_rows = False
        self._now_unix_s = 0.0
        self._assumed: list[tuple[str, Any, Any]] = []

    @classmethod
    def of(cls, snapshot: ClusterSnapshot) -> "Fleet":
        """Return a fleet of a snapshot's records."""
        fleet = cls()
        fleet.restart(snapshot)
        return fleet

    def restart(self, snapshot: ClusterSnapshot) -> None:
        """Forget everything and begin from `snapshot`, whose models may include adapters."""
        self.__init__()  # type: ignore[misc]
        for kind in ID_FIELDS:
            records = getattr(snapshot, kind)
            for record in records.values() if isinstance(records, Mapping) else records:
                self.put(kind, record)
        self.set_unreachable(snapshot.unreachable)
        self.set_awaited(snapshot.awaited)

    def put(self, kind: str, record: Any) -> None:
        """Note a record as it is now. Kinds that no decision depends on are ignored."""
        if kind not in ID_FIELDS:
            return
        table, record_id = self.records.table(kind), id_of(kind, record)
        before = table.get(record_id)
        if before != record:
            table[record_id] = record
            note_change(self, kind, record_id, before, record)

    def remove(self, kind: str, record_id: Any) -> None:
        """Note that a record is gone; a string or a pair names it, as in the cluster's view."""
        if kind in ID_FIELDS:
            before = self.records.table(kind).pop(record_id, None)
            if before is not None:
                note_change(self, kind, record_id, before, None)

    def set_unreachable(self, workers: Collection[WorkerId]) -> None:
        """Say whose connection is broken though their lease still runs."""
        for worker_id in self.records.unreachable ^ frozenset(workers):
            self.touch_worker(worker_id)
            self.dirty_models |= self.index.held.get(worker_id, set())
        self.records.unreachable = frozenset(workers)

    def set_awaited(self, until_unix_s: Mapping[WorkerId, float]) -> None:
        """Say which workers without a record may yet register again, and until when."""
        for worker_id in self.records.awaited.keys() | until_unix_s.keys():
            if self.records.awaited.get(worker_id) != until_unix_s.get(worker_id):
                self.dirty_models |= self.index.held.get(worker_id, set())
        self.records.awaited = dict(until_unix_s)

    def assume(self, kind: str, record: Any) -> None:
        """Put a record until `retract`: what one model takes counts for those after it."""
        record_id = id_of(kind, record)
        self._assumed.append((kind, record_id, self.records.table(kind).get(record_id)))
        self.put(kind, record)

    def assume_gone(self, kind: str, record_id: Any) -> None:
        """Remove a record until `retract`."""
        self._assumed.append((kind, record_id, self.records.table(kind).get(record_id)))
        self.remove(kind, record_id)

    def retract(self) -> None:
        """Take back all that was assumed."""
        while self._assumed:
            kind, record_id, before = self._assumed.pop()
            if before is None:
                self.remove(kind, record_id)
            else:
                self.put(kind, before)

    def refresh(self, policy: SchedulerPolicy, now_unix_s: float) -> None:
        """Bring every touched row up to date, and those whose replicas may go by now."""
        if not self._has_rows or policy != self.policy:
            self._has_rows, self.policy = True, policy
            self._limits.clear()
            self.look_at_all()
            self.dirty_workers |= self.records.workers.keys()
        self._now_unix_s = now_unix_s
        self.dirty_workers |= self.worker_due.take(now_unix_s)
        self.dirty_workers |= self.claims.drop_expired(now_unix_s)
        # In order: the same records and times lead to the same decisions in every process.
        for model in sorted(self.dirty_models):
            self._refresh_flags(model)
        figures: dict[NodeId, NodeFigures | None] = {}
        while self.dirty_workers:
            touched, self.dirty_workers = self.dirty_workers, set()
            for worker_id in sorted(touched):
                self._refresh_row(worker_id, figures)

    def keep_warm(self, policy: SchedulerPolicy, now_unix_s: float) -> None:
        """Bring the rows up to date for who may decide one day and has decided nothing yet."""
        self.refresh(policy, now_unix_s)
        self.dirty_models.clear()

    def look_at_all(self) -> None:
        """Have every model looked at, as who decides from now on has looked at none.

        Those too that only a move or a decision still names: it has to be ended, or to go.
        """
        records, index = self.records, self.index
        self.dirty_models |= records.models.keys() | records.decisions.keys()
        self.dirty_models |= index.holders.keys() | index.moves.keys()

    def take_dirty(self) -> set[ModelName]:
        """Return the models that changed, and forget that they did."""
        taken, self.dirty_models = self.dirty_models, set()
        return taken

    def next_due_unix_s(self) -> float | None:
        """Return when to look again though nothing changes; workers matter while models wait."""
        due = [self.model_due.earliest()]
        if self.blocked:
            due += [self.worker_due.earliest(), self.claims.earliest_end()]
        return min((each for each in due if each is not None), default=None)

    def snapshot(self) -> ClusterSnapshot:
        """Return the records as they are now; adapters are left out and count as their bases."""
        raw = self.records.as_snapshot()
        return replace(
            raw,
            models=placeable(raw.models),
            deployments=on_bases(raw.deployments, raw.models),
        )

    def check(self) -> None:
        """Raise AssertionError unless the index is what one made anew from the records is."""
        anew = Fleet.of(self.records.as_snapshot())
        anew.claims, anew.gears = self.claims, self.gears
        anew.refresh(self.policy, self._now_unix_s)
        self.refresh(self.policy, self._now_unix_s)
        for name, index in vars(self.index).items():
            assert index == vars(anew.index)[name], f"index of {name} differs"
        assert self.rows.as_dict() == anew.rows.as_dict(), "rows differ"
        mine, its = self.rows.kinds_of_slots(), anew.rows.kinds_of_slots()
        assert sorted(mine) == sorted(its), "kinds of slots differ"
        assert self.victims == anew.victims, "victims differ"
        assert self.worker_due.as_dict() == anew.worker_due.as_dict(), "workers' due times differ"
        assert not self._assumed, "assumed records were not taken back"

    def _refresh_flags(self, model: ModelName) -> None:
        waiting = self.index.waiting.get(model)
        is_interactive = waiting is not None and waiting.batch_jobs < waiting.jobs
        spare, kept = self.is_spare(model), self.kept(model)
        flags = ModelFlags(waiting is not None, is_interactive, spare, kept)
        if self.flags.get(model) != flags:
            self.dirty_workers |= self.index.holders.get(model, set())
            self.flags[model] = flags
        if model not in self.records.models and model not in self.index.holders:
            del self.flags[model]

    def _refresh_row(self, worker_id: WorkerId, figures: dict[NodeId, NodeFigures | None]) -> None:
        worker = self.records.workers.get(worker_id)
        if worker is None:
            self.rows.drop(worker_id)
            for model in tuple(self.claims.on(worker_id)):
                self.dirty_models.add(model)
                self.dirty_workers |= self.claims.drop_at(model, (worker_id,)) - {worker_id}
            self.victims.pop(worker_id, None)
            self.worker_due.put(worker_id, None)
            return
        before = self.rows.get(worker_id)
        if worker.node_id not in figures:
            node = self.records.nodes.get(worker.node_id)
            figures[worker.node_id] = node_figures(self, node) if node else None
        row, victims, due_unix_s = row_of(self, worker, figures[worker.node_id], self._now_unix_s)
        number = self.rows.put(worker_id, row)
        self.label_masks.note(number, worker)
        self.worker_due.put(worker_id, due_unix_s)
        if victims:
            self.victims[worker_id] = victims
        else:
            self.victims.pop(worker_id, None)
        # Who claims room is looked at whatever changed: its own claim hides what came free.
        if row.offers_more_than(before) or (row != before and self.claims.on(worker_id)):
            self.grown.add(worker_id)
