"""Keeps what a leader decides from true to cluster state: fleet, links to workers, learned starts.

Each change of a record costs what that record is about; nothing here looks at all records, but for
the beginning of a term and a new listing.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.records import AssignmentRecord, ModelRecord, ReplicaRecord, WorkerRecord
from gearfall.infra.state.change_feed import Change, Changes
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.scheduling.actions import Action, Assign
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.prefetching.forecast import ArrivalHistory
from gearfall.scheduling.scaling.autoscaler_load import ModelLoad
from gearfall.scheduling.snapshot import ClusterSnapshot
from services.scheduler.expected import INDEPENDENT, ExpectedRecords
from services.scheduler.reachability import LEASE_GRACE_S, note_absent
from services.scheduler.start_learning import StartLearning
from services.scheduler.worker_links import Links

DECISIVE = frozenset(
    {
        *("models", "deployments", "nodes", "workers", "assignments", "replicas"),
        *("demand", "load", "moves", "prefetch", "gear_plans", "gear_votes"),
    }
)
"""Kinds whose change may change a decision."""


class FleetFollower:
    """Owner of the fleet of one term, and of the time before it."""

    def __init__(
        self,
        links: Links,
        starts: StartLearning,
        clock: Callable[[], float],
        *,
        leads: bool = True,
    ) -> None:
        """While it does not lead, it has no connections to workers and learns nothing of starts."""
        self._leads = leads
        self.fleet = Fleet()
        self._expected = ExpectedRecords(self.fleet)
        self._links = links
        self._starts = starts
        self._clock = clock
        self._addresses: dict[WorkerId, str] = {}
        self._assigned: Counter[WorkerId] = Counter()
        """Assignments by worker."""
        self._models: dict[ModelName, ModelRecord] = {}
        self._assignments: dict[tuple[WorkerId, ModelName], AssignmentRecord] = {}
        self._absent_since_unix_s: Mapping[WorkerId, float] = {}
        self._absent: set[WorkerId] = set()
        """Workers that have assignments and no record."""
        self.load_changes = 0
        """Times that a router said what came to it."""
        self._has_moved = False
        """Whether a worker came or went, or its connection did, since `_follow_workers`."""
        self._adrift: dict[tuple[WorkerId, ModelName], tuple[float, ReplicaRecord]] = {}
        """Replicas whose assignments a lost state took with it, and since when they are known."""

    def lead(self) -> None:
        """Begin to lead: whatever stands is looked at, and learned from what is not known yet."""
        self._leads = self._has_moved = True
        self.fleet.look_at_all()
        for replica in self.fleet.records.replicas.values():
            self._learn(replica)

    def take_in(self, changes: Changes) -> bool:
        """Apply changes; return whether a decision may come out differently."""
        if changes.restart is not None:
            self._restart(changes.restart)
            self._expected.restart(changes.restart.revision)
        for change in changes.records:
            self._apply(change, changes.revision)
        self._expected.settle(changes.revision)
        has_moved = self._has_moved and self._leads
        if has_moved:
            self._follow_workers()
        return has_moved or any(change.kind in DECISIVE for change in changes.records)

    def may_expect(self, steps: Sequence[Action]) -> bool:
        """Whether the next decision may be made while steps are on their way."""
        is_independent = all(isinstance(each, INDEPENDENT) for each in steps)
        return is_independent and not self._expected.holds_any(steps)

    def expect(self, steps: Sequence[Action]) -> Callable[[int], None]:
        """Have steps count that are on their way; call what is returned with their revision."""
        places = self._expected.add(steps)
        return lambda revision: self._expected.note_written(places, revision)

    def expect_nothing(self) -> None:
        """Nothing is on its way any more; a restart follows."""
        self._expected.clear()

    def note_link(self) -> None:
        """A worker came into reach or went out of it: the next `take_in` looks."""
        self._has_moved = True

    def adoptions(self) -> tuple[Assign, ...]:
        """Return assignments for replicas that serve on though cluster state lost its memory.

        A store that comes back registers its models again; a replica of one that nobody has waits
        as long as for a worker, and is then assigned too, so that it can be given back.
        """
        now_unix_s = self._clock()
        return tuple(
            Assign(
                AssignmentRecord(
                    *(*key, replica.memory_bytes, "serves since before cluster state was lost"),
                    assigned_unix_s=now_unix_s,
                )
            )
            for key, (since_unix_s, replica) in sorted(self._adrift.items())
            if key not in self._assignments
            and key[0] in self._addresses
            and (key[1] in self._models or now_unix_s >= since_unix_s + LEASE_GRACE_S)
        )

    def adoption_due_unix_s(self) -> float | None:
        """When a replica that waits for its model is assigned all the same; None for never."""
        waiting = [
            since_unix_s
            for key, (since_unix_s, _) in self._adrift.items()
            if key not in self._assignments and key[0] in self._addresses
        ]
        return min(waiting) + LEASE_GRACE_S if waiting else None

    def check(self) -> None:
        """Assert that what is counted here is what the records say."""
        assert self._assigned == Counter(worker for worker, _ in self._assignments)
        assert self._absent == self._assigned.keys() - self._addresses.keys()
        self.fleet.check()

    @property
    def arrivals(self) -> Mapping[ModelName, ArrivalHistory]:
        """When jobs came for each model that any came for."""
        loads = self.fleet.loads.items()
        return {name: load.arrivals for name, load in loads if load.arrivals.last_unix_s > 0.0}

    def restore_arrivals(self, arrivals: Mapping[ModelName, ArrivalHistory]) -> None:
        """Begin from what another leader knew of arrivals."""
        self.fleet.loads.update((name, ModelLoad(arrivals=each)) for name, each in arrivals.items())

    def _restart(self, view: ClusterView) -> None:
        loads = self.fleet.loads
        self.fleet.restart(
            ClusterSnapshot(
                models=view.models,
                deployments=view.deployments,
                nodes=view.nodes,
                workers=view.workers,
                assignments=view.assignments,
                replicas=view.replicas,
                demand=tuple(view.demand.values()),
                decisions=view.decisions,
                moves=view.moves,
                prefetch=view.prefetch,
                load=view.load,
                gear_plans=view.gear_plans,
                gear_votes=view.gear_votes,
            )
        )
        # What came in all that time stands in no record.
        self.fleet.loads.update(loads)
        self._addresses = {each.worker_id: each.address for each in view.workers.values()}
        self._assignments = dict(view.assignments)
        self._assigned = Counter(worker for worker, _ in view.assignments)
        self._absent = self._assigned.keys() - self._addresses.keys()
        self._has_moved = True
        self._models = dict(view.models)
        self._starts.forget_absent(view.replicas.keys())
        self._adrift = {}
        for key, replica in view.replicas.items():
            self._note_adrift(key, replica)
            self._learn(replica)

    def _apply(self, change: Change, revision: int) -> None:
        record, record_id = change.record, change.record_id
        self.load_changes += change.kind == "load"
        if self._expected.holds_back(change, revision):
            pass
        elif record is None:
            self.fleet.remove(change.kind, record_id)
        else:
            self.fleet.put(change.kind, record)
        match change.kind:
            case "workers":
                _set(self._addresses, record_id, _address_of(record))
                self._has_moved = True
                self._note_absent(record_id)
            case "models":
                _set(self._models, record_id, record)
            case "assignments":
                self._assign(record_id, record)
            case "replicas":
                self._note_adrift(record_id, record)
                self._learn_or_forget(record_id, record)

    def _assign(self, key: tuple[WorkerId, ModelName], record: Any) -> None:
        was_there = key in self._assignments
        _set(self._assignments, key, record)
        self._assigned[key[0]] += (record is not None) - was_there
        if not self._assigned[key[0]]:
            del self._assigned[key[0]]
        self._note_absent(key[0])

    def _note_absent(self, worker_id: WorkerId) -> None:
        is_absent = worker_id in self._assigned and worker_id not in self._addresses
        if is_absent != (worker_id in self._absent):
            self._absent ^= {worker_id}
            self._has_moved = True

    def _note_adrift(self, key: tuple[WorkerId, ModelName], record: Any) -> None:
        if isinstance(record, ReplicaRecord) and record.is_adrift:
            since_unix_s, _ = self._adrift.get(key, (self._clock(), record))
            self._adrift[key] = (since_unix_s, record)
        else:
            self._adrift.pop(key, None)

    def _learn_or_forget(self, key: tuple[WorkerId, ModelName], record: Any) -> None:
        if record is None:
            self._starts.forget(key)
        else:
            self._learn(record)

    def _learn(self, record: Any) -> None:
        assert isinstance(record, ReplicaRecord)
        if not self._leads:
            return
        key = (record.worker_id, record.model)
        self._starts.take(record, self._assignments.get(key), self._models.get(record.model))

    def _follow_workers(self) -> None:
        """Keep a connection to every worker, and to those that left but have assignments."""
        self._has_moved = False
        since = note_absent(self._absent_since_unix_s, self._absent, self._clock())
        self._absent_since_unix_s = since
        self._links.follow(self._addresses, self._absent)
        self.fleet.set_unreachable(frozenset(filter(self._links.is_down, self._addresses)))
        self.fleet.set_awaited(
            {
                worker_id: since_unix_s + LEASE_GRACE_S
                for worker_id, since_unix_s in self._absent_since_unix_s.items()
                if not self._links.is_down(worker_id)
            }
        )


def _set(table: dict[Any, Any], key: Any, value: Any) -> None:
    """Put a value, or remove the key where there is none."""
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


def _address_of(record: Any) -> str | None:
    return record.address if isinstance(record, WorkerRecord) else None
