"""One decision step: a frozen snapshot and the time in, assignments to write and to delete out.

Order: assignments that can no longer hold go first; then every model is scaled, those that waited
longest first; what one model takes or gives back in this step counts for the models after it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import (
    AssignmentRecord,
    DecisionRecord,
    ModelRecord,
    ReplicaRecord,
    ReplicaState,
)
from gearfall.scheduling.actions import Action, Assign, Decide, Unassign
from gearfall.scheduling.autoscaler import (
    ModelLimits,
    SchedulerPolicy,
    evictable_at,
    limits_by_model,
    scale_model,
)
from gearfall.scheduling.autoscaler_load import ModelLoad
from gearfall.scheduling.fleet import Fleet
from gearfall.scheduling.placement import (
    MakeRoom,
    Nodes,
    Place,
    Placement,
    Rejected,
    Victim,
    Wait,
    place,
)
from gearfall.scheduling.snapshot import (
    ClusterSnapshot,
    Hosted,
    ReplicaKey,
    Waiting,
    WorkerRoom,
    loading_by_node,
    reserved_bytes,
    rooms_of,
    waiting_by_model,
)
from gearfall.scheduling.start_costs import StartCosts


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, in order, and when to look again though nothing changed."""

    actions: tuple[Action, ...]
    next_due_unix_s: float | None = None


def reconcile(
    snapshot: ClusterSnapshot, costs: StartCosts, policy: SchedulerPolicy, now_unix_s: float
) -> Plan:
    """Compare what is wanted with what is there and return the steps towards it."""
    return decide(Fleet.of(snapshot), costs, policy, now_unix_s)


def decide(fleet: Fleet, costs: StartCosts, policy: SchedulerPolicy, now_unix_s: float) -> Plan:
    """Return the steps towards what is wanted, looking only at what changed or is due.

    Never two assignments for one (worker, model), never more on a worker than it holds. The fleet's
    records stay as they are: the caller puts what it has written.
    """
    step = _Step(fleet.snapshot(), costs, policy, now_unix_s)
    step.drop_what_cannot_hold()
    for model in step.models_in_order():
        step.scale(model)
    due = [at for at in step.due_unix_s if at > now_unix_s]
    return Plan(tuple(step.actions), min(due, default=None))


def _is_draining(replica: ReplicaRecord | None) -> bool:
    return replica is not None and replica.state is ReplicaState.DRAINING


@dataclass(slots=True)
class _Step:
    """Working state of one call of `reconcile`."""

    snapshot: ClusterSnapshot
    costs: StartCosts
    policy: SchedulerPolicy
    now_unix_s: float
    load: Mapping[ModelName, ModelLoad] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    due_unix_s: list[float] = field(default_factory=list)
    rooms: dict[WorkerId, WorkerRoom] = field(init=False)
    loading: dict[NodeId, dict[ModelName, ModelRecord]] = field(init=False)
    hosted: dict[ModelName, dict[ReplicaKey, Hosted]] = field(init=False)
    waiting: dict[ModelName, Waiting] = field(init=False)
    limits: dict[ModelName, ModelLimits] = field(init=False)

    def __post_init__(self) -> None:
        self.rooms = rooms_of(self.snapshot)
        self.loading = loading_by_node(self.snapshot)
        self.waiting = waiting_by_model(self.snapshot.demand)
        models = self.snapshot.models
        self.limits = limits_by_model(models, self.snapshot.deployments, self.policy)
        self.hosted = {model: {} for model in models}
        for key, assignment in self.snapshot.assignments.items():
            replica = self.snapshot.replicas.get(key)
            self.hosted.setdefault(key[1], {})[key] = Hosted(assignment, replica)

    def models_in_order(self) -> list[ModelName]:
        """Models by how long they have been waited for; those nobody waits for last."""

        def order(model: ModelName) -> tuple[float, ModelName]:
            waiting = self.waiting.get(model)
            return (waiting.since_unix_s if waiting else float("inf"), model)

        return sorted(self.snapshot.models, key=order)

    def drop_what_cannot_hold(self) -> None:
        """Delete assignments of vanished workers and models, and of workers that give them back."""
        for key in sorted(self.snapshot.assignments):
            replica = self.snapshot.replicas.get(key)
            worker = self.snapshot.workers.get(key[0])
            if key[1] not in self.snapshot.models:
                self._unassign(key, f"model {key[1]} was removed")
            elif worker is None:
                self._drop_unless_awaited(key)
            elif worker.max_replicas < 1 or _is_draining(replica):
                self._unassign(key, f"worker {key[0]} is draining")

    def _drop_unless_awaited(self, key: ReplicaKey) -> None:
        until_unix_s = self.snapshot.awaited.get(key[0], self.now_unix_s)
        if until_unix_s > self.now_unix_s:
            self.due_unix_s.append(until_unix_s)
        else:
            self._unassign(key, f"worker {key[0]} is gone")

    def scale(self, model: ModelName) -> None:
        """Give back what is too much of one model, or start what is missing."""
        self._release_failing(model)
        hosted = self._counted(model)
        decision = scale_model(
            hosted,
            self.waiting.get(model),
            self.limits[model],
            self.load.get(model, ModelLoad()),
            policy=self.policy,
            now_unix_s=self.now_unix_s,
        )
        for key, reason in decision.surplus:
            self._unassign(key, reason)
            self._decide(model, "stop", reason, worker_id=key[0])
        if decision.next_due_unix_s is not None:
            self.due_unix_s.append(decision.next_due_unix_s)
        for _ in range(decision.missing):
            if not self._start_one(self.snapshot.models[model]):
                break

    def _counted(self, model: ModelName) -> tuple[Hosted, ...]:
        """What a model really has: on workers that are in reach, and not failing there."""
        hosted = (self.hosted[model][key] for key in sorted(self.hosted[model]))
        return tuple(
            each
            for each in hosted
            if (room := self.rooms.get(each.key[0])) and room.is_reachable and not each.is_failing
        )

    def _release_failing(self, model: ModelName) -> None:
        """Give failing replicas back after a while: whoever asks then gets new attempts."""
        stay_s = max(self.policy.failing_stay_s, self.limits[model].keep_alive_s)
        for key, hosted in sorted(self.hosted[model].items()):
            if not hosted.is_failing or hosted.replica is None:
                continue
            due_unix_s = hosted.replica.idle_since_unix_s + stay_s
            if due_unix_s > self.now_unix_s:
                self.due_unix_s.append(due_unix_s)
                continue
            reason = f"did not start for {stay_s:g} s: {hosted.replica.error}"
            self._unassign(key, reason)
            self._decide(model, "stop", reason, worker_id=key[0])

    def _start_one(self, model: ModelRecord) -> bool:
        placement: Placement = place(
            model,
            self.rooms,
            Nodes(self.snapshot.nodes, self.loading),
            self._victims(model.name),
            costs=self.costs,
            now_unix_s=self.now_unix_s,
        )
        match placement:
            case Place():
                self._assign(model.name, placement)
                return True
            case MakeRoom():
                for victim in placement.victims:
                    self._unassign(victim.key, f"makes room for {model.name}")
                    why = f"makes room for {model.name}"
                    self._decide(victim.key[1], "stop", why, worker_id=victim.key[0])
                self._decide(model.name, "wait", placement.reason, rejected=placement.rejected)
            case Wait():
                if placement.next_due_unix_s is not None:
                    self.due_unix_s.append(placement.next_due_unix_s)
                self._decide(model.name, "wait", placement.reason, rejected=placement.rejected)
        return False

    def _victims(self, wanting: ModelName) -> Iterable[Victim]:
        """Yield replicas of other models that may make room; only demand takes room."""
        waiting = self.waiting.get(wanting)
        if waiting is None:
            return
        for model, hosted_by_key in self.hosted.items():
            limits = self.limits.get(model)
            if model == wanting or limits is None:
                continue
            spare = len(self._counted(model)) > limits.min_replicas
            for key, hosted in hosted_by_key.items():
                at = evictable_at(
                    hosted,
                    has_demand=model in self.waiting,
                    spare=spare,
                    wanted_since_unix_s=waiting.since_unix_s,
                    policy=self.policy,
                )
                if at is not None and hosted.replica is not None:
                    idle_since_s = hosted.replica.idle_since_unix_s
                    yield Victim(key, reserved_bytes(self.snapshot, key), at, idle_since_s)

    def _assign(self, model: ModelName, placement: Place) -> None:
        assignment = AssignmentRecord(
            worker_id=placement.worker_id,
            model=model,
            memory_bytes=placement.memory_bytes,
            reason=placement.reason,
            assigned_unix_s=self.now_unix_s,
            predicted_start_s=placement.prediction.total_s,
        )
        room = self.rooms[placement.worker_id]
        self.rooms[placement.worker_id] = room.with_replica(model, placement.memory_bytes)
        self.loading.setdefault(room.worker.node_id, {})[model] = self.snapshot.models[model]
        self.actions.append(Assign(assignment))
        self._decide(
            model,
            "start",
            placement.reason,
            worker_id=placement.worker_id,
            predicted_start_s=placement.prediction.total_s,
            rejected=placement.rejected,
        )

    def _unassign(self, key: ReplicaKey, reason: str) -> None:
        worker_id, model = key
        self.hosted[model].pop(key, None)
        if worker_id in self.rooms:
            size = reserved_bytes(self.snapshot, key)
            self.rooms[worker_id] = self.rooms[worker_id].with_leaving(model, size)
        self.actions.append(Unassign(key, reason))

    def _decide(
        self,
        model: ModelName,
        decision: str,
        reason: str,
        *,
        worker_id: str = "",
        predicted_start_s: float = 0.0,
        rejected: Rejected = (),
    ) -> None:
        """Note a decision, unless it is the one that stands already."""
        last = self.snapshot.decisions.get(model)
        if (
            decision == "wait"
            and last is not None
            and (last.decision, last.reason, last.rejected) == (decision, reason, rejected)
        ):
            return
        record = DecisionRecord(
            model, self.now_unix_s, decision, reason, worker_id, predicted_start_s, rejected
        )
        self.actions.append(Decide(record))
