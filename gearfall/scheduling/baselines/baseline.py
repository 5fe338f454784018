"""The decision step of the simple policies: the same scaling as ours, plainer placement.

One model after the other, those that waited longest first. An idle replica may leave at once when
another model waits, a busy one after the policy's patience.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gearfall.core.ids import ModelName
from gearfall.core.memory import estimate_replica_memory
from gearfall.core.origin import source_tier
from gearfall.core.records import (
    AssignmentRecord,
    DecisionRecord,
    ModelRecord,
    NodeRecord,
    ReplicaState,
)
from gearfall.scheduling.actions import Action, Assign, Decide, Unassign, Undecide
from gearfall.scheduling.baselines.baseline_rules import Option, RoomRule, Rule, draw_for
from gearfall.scheduling.baselines.baseline_view import View
from gearfall.scheduling.estimates.estimator import predict_start
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.reconcile import Plan
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy, evictable_at, scale_model
from gearfall.scheduling.scaling.autoscaler_load import ModelLoad
from gearfall.scheduling.snapshot import (
    ClusterSnapshot,
    Hosted,
    ReplicaKey,
    Waiting,
    WorkerRoom,
    reserved_bytes,
)

DecideStep = Callable[[Fleet, StartCosts, SchedulerPolicy, float], Plan]
"""One decision: `reconcile.decide` or another that keeps its promises."""


def simple_step(rule: Rule, seed: int) -> DecideStep:
    """Return a simple policy's decision step; it keeps the promises of `reconcile.decide`."""

    def step(fleet: Fleet, costs: StartCosts, policy: SchedulerPolicy, now_unix_s: float) -> Plan:
        return _decide(_Step(rule, seed, fleet.snapshot(), costs, policy, now_unix_s))

    return step


def _decide(step: "_Step") -> Plan:
    step.drop_what_cannot_hold()
    for model in step.view.models_in_order():
        step.scale(model)
    due = [at for at in step.due_unix_s if at > step.now_unix_s]
    return Plan(tuple(step.actions), min(due, default=None))


@dataclass(slots=True)
class _Step:
    """Working state of one decision."""

    rule: Rule
    seed: int
    snapshot: ClusterSnapshot
    costs: StartCosts
    policy: SchedulerPolicy
    now_unix_s: float
    actions: list[Action] = field(default_factory=list)
    due_unix_s: list[float] = field(default_factory=list)
    view: View = field(init=False)

    def __post_init__(self) -> None:
        self.view = View(self.snapshot, self.policy)

    def drop_what_cannot_hold(self) -> None:
        """Delete assignments of vanished workers and models, and of workers that drain."""
        for key in sorted(self.snapshot.assignments):
            worker, replica = self.snapshot.workers.get(key[0]), self.snapshot.replicas.get(key)
            awaited_unix_s = self.snapshot.awaited.get(key[0], self.now_unix_s)
            if key[1] not in self.snapshot.models:
                self._unassign(key, f"model {key[1]} was removed")
            elif worker is None and awaited_unix_s > self.now_unix_s:
                self.due_unix_s.append(awaited_unix_s)
            elif worker is None:
                self._unassign(key, f"worker {key[0]} is gone")
            elif worker.max_replicas < 1 or (
                replica is not None and replica.state is ReplicaState.DRAINING
            ):
                self._unassign(key, f"worker {key[0]} is draining")
        removed = self.snapshot.decisions.keys() - self.snapshot.models.keys()
        self.actions += map(Undecide, sorted(removed))

    def scale(self, model: ModelName) -> None:
        """Give back what is too much of one model, or start what is missing."""
        decision = scale_model(
            self.view.counted(model),
            self.view.waiting.get(model),
            self.view.limits[model],
            ModelLoad(),
            policy=self.policy,
            now_unix_s=self.now_unix_s,
        )
        for key, reason in decision.surplus:
            self._unassign(key, reason)
            self._decide(model, "stop", reason, key[0])
        if decision.next_due_unix_s is not None:
            self.due_unix_s.append(decision.next_due_unix_s)
        for _ in range(decision.missing):
            if not self._start_one(self.snapshot.models[model]):
                break

    def _start_one(self, model: ModelRecord) -> bool:
        """Start one more replica; False when it has to wait for room."""
        options = self._options(model)
        fitting = [each for each in options if each.room.fits(each.memory_bytes)]
        if self.rule.room is RoomRule.NEAREST_ONLY and options:
            nearest = options[0].nearness
            options = [each for each in options if each.nearness == nearest]
            fitting = [each for each in fitting if each.nearness == nearest]
        if fitting and not self._is_preempting_better(model.name, fitting[0], options):
            self._assign(model, fitting[0])
            return True
        self._make_room(model, options)
        return False

    def _options(self, model: ModelRecord) -> list[Option]:
        found = []
        for room in self.view.rooms.values():
            node = self.snapshot.nodes.get(room.worker.node_id)
            option = self._option(model, room, node) if node is not None else None
            if option is not None:
                draw = draw_for(self.seed, model.name, option.worker_id, self.now_unix_s)
                found.append((self.rule.order(model, option, draw), option.worker_id, option))
        return [option for *_, option in sorted(found, key=lambda each: each[:2])]

    def _option(self, model: ModelRecord, room: WorkerRoom, node: NodeRecord) -> Option | None:
        worker = room.worker
        memory_bytes = estimate_replica_memory(model, worker.slots).total_bytes
        tier = source_tier(model, node, self.snapshot.nodes)
        can_host = (
            room.is_reachable
            and worker.max_replicas > 0
            and model.name not in room.hosting
            and memory_bytes <= worker.memory_bytes
            and model.size_bytes <= node.dram_capacity_bytes
        )
        if not can_host or tier is None:
            return None
        prediction = predict_start(model, node, tier, self.costs)
        return Option(room, memory_bytes, prediction, self.view.jobs_on.get(node.node_id, 0))

    def _is_preempting_better(
        self, model: ModelName, fitting: Option, options: list[Option]
    ) -> bool:
        if self.rule.room is not RoomRule.PREEMPT:
            return False
        best = options[0]
        if best.prediction.total_s >= fitting.prediction.total_s:
            return False
        return best.room.fits(best.memory_bytes, after_leaving=True) or bool(
            self._leaving(best, model)
        )

    def _make_room(self, model: ModelRecord, options: list[Option]) -> None:
        full = [each for each in options if not each.room.fits(each.memory_bytes)]
        if any(each.room.fits(each.memory_bytes, after_leaving=True) for each in full):
            return
        for option in full:
            leaving = self._leaving(option, model.name)
            for key in leaving:
                reason = f"makes room for {model.name}"
                self._unassign(key, reason)
                self._decide(key[1], "stop", reason, key[0])
            if leaving:
                return
        self._decide(model.name, "wait", "no worker has room")

    def _leaving(self, option: Option, for_model: ModelName) -> list[ReplicaKey]:
        """Return replicas of a worker that leave for this one, idle ones first; [] for too few."""
        room, chosen = option.room, []
        for key, hosted in sorted(self.view.on(option.worker_id), key=lambda each: _value(each[1])):
            at_unix_s = self._may_leave_at(hosted, for_model)
            if at_unix_s is None or at_unix_s > self.now_unix_s:
                self.due_unix_s += [] if at_unix_s is None else [at_unix_s]
                continue
            room = room.with_leaving(key[1], reserved_bytes(self.snapshot, key))
            chosen.append(key)
            if room.fits(option.memory_bytes, after_leaving=True):
                return chosen
        return []

    def _may_leave_at(self, hosted: Hosted, for_model: ModelName) -> float | None:
        model = hosted.key[1]
        limits = self.view.limits.get(model)
        spare = limits is not None and len(self.view.counted(model)) > limits.min_replicas
        if not spare:
            return None
        if hosted.is_idle and model not in self.view.waiting:
            return self.now_unix_s
        waiting = self.view.waiting.get(for_model)
        if self.rule.room is RoomRule.PREEMPT and hosted.is_ready:
            return self._preemptible_at(hosted, waiting)
        return evictable_at(
            hosted,
            has_demand=model in self.view.waiting,
            spare=spare,
            wanted_since_unix_s=waiting.since_unix_s if waiting else self.now_unix_s,
            policy=self.policy,
        )

    def _preemptible_at(self, hosted: Hosted, wanting: Waiting | None) -> float | None:
        """Return from when a busy replica may be stopped for another model's jobs.

        It runs as long as its start took, once it has computed anew what its jobs had, or nothing
        else would ever happen; and its own jobs came after those that it is stopped for, or it
        would take the room back at once.
        """
        own, replica = self.view.waiting.get(hosted.key[1]), hosted.replica
        is_later = own is None or (wanting is not None and own.since_unix_s > wanting.since_unix_s)
        if wanting is None or replica is None or not is_later:
            return None
        tokens = sum(job.prompt_tokens + job.output_tokens for job in replica.jobs)
        anew_s = tokens * replica.move_s_per_token
        return hosted.assignment.assigned_unix_s + 2 * hosted.start_s + anew_s

    def _assign(self, model: ModelRecord, option: Option) -> None:
        reason = f"{self.rule.name}: worker {option.worker_id}"
        predicted_s = option.prediction.total_s
        assignment = AssignmentRecord(
            option.worker_id, model.name, option.memory_bytes, reason, self.now_unix_s, predicted_s
        )
        self.view.took(option.worker_id, model.name, option.memory_bytes)
        self.actions.append(Assign(assignment))
        self._decide(model.name, "start", reason, option.worker_id, predicted_s)

    def _unassign(self, key: ReplicaKey, reason: str) -> None:
        self.view.gave_back(key)
        self.actions.append(Unassign(key, reason))

    def _decide(
        self,
        model: ModelName,
        decision: Literal["start", "stop", "wait"],
        reason: str,
        worker_id: str = "",
        predicted_s: float = 0.0,
    ) -> None:
        last = self.snapshot.decisions.get(model)
        if last and decision == "wait" and (last.decision, last.reason) == (decision, reason):
            return
        record = DecisionRecord(model, self.now_unix_s, decision, reason, worker_id, predicted_s)
        self.actions.append(Decide(record))


def _value(hosted: Hosted) -> tuple[bool, float, ReplicaKey]:
    """Least recently used first; of busy ones that with the least to lose."""
    replica = hosted.replica
    idle_since_s = replica.idle_since_unix_s if replica else 0.0
    done = sum(job.output_tokens for job in replica.jobs) if replica else 0
    return (idle_since_s == 0.0, idle_since_s or float(done), hosted.key)
