"""What a scheduler answers, leading or not: who leads, and why a model is where it is."""

from dataclasses import dataclass

from gearfall.core.errors import NotFound
from gearfall.core.ids import ModelName
from gearfall.core.records import (
    DemandRecord,
    MoveRecord,
    PrefetchRecord,
    ReplicaRecord,
    ReplicaState,
)
from gearfall.infra.state.cluster import Cluster
from services.scheduler.decision_log import Decided, DecisionLog
from services.scheduler.loop import SchedulerLoop


@dataclass(frozen=True, slots=True)
class Status:
    """Who leads, as this scheduler sees it."""

    scheduler_id: str
    leader_id: str
    """Empty when there is none."""
    is_leader: bool
    fence_revision: int
    """0 unless this scheduler leads."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One decision or start; fields mirror `gearfall.v1.Explanation`."""

    at_unix_s: float
    subject: str
    decision: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    predicted_s: float = 0.0
    measured_s: float = 0.0


class SchedulerService:
    """Answers from the view; never writes."""

    def __init__(
        self, cluster: Cluster, loop: SchedulerLoop, log: DecisionLog, scheduler_id: str
    ) -> None:
        """`log` is fed by its owner."""
        self._cluster = cluster
        self._loop = loop
        self._log = log
        self._scheduler_id = scheduler_id

    def status(self) -> Status:
        """Return who leads."""
        leader, fence = self._cluster.view.leader, self._loop.fence
        return Status(
            scheduler_id=self._scheduler_id,
            leader_id=leader.scheduler_id if leader else "",
            is_leader=fence is not None,
            fence_revision=fence.create_revision if fence else 0,
        )

    def explain(self, model: ModelName) -> tuple[Explanation, ...]:
        """Return what is known about a model, newest first.

        The last decisions with what was rejected, starts as predicted and as they went, moves that
        are under way, wishes to have it near, and who waits for it. For a LoRA adapter those of its
        base, on whose replicas it runs. Raises NotFound for a model that is not registered.
        """
        view = self._cluster.view
        if model not in view.models:
            raise NotFound(f"model {model!r} is not registered", param="model")
        model = ModelName(view.models[model].base) or model
        found = [
            *(self._of_replica(each) for each in view.replicas.values() if each.model == model),
            *(_of_decided(each) for each in self._log.of(model)),
            *(_of_move(each) for each in view.moves.values() if model in _models_of(each)),
            *(_of_wish(each) for each in view.prefetch.values() if each.model == model),
            *(_of_demand(each) for each in view.demand.values() if each.model == model),
        ]
        return tuple(sorted(found, key=lambda e: -e.at_unix_s))

    def _of_replica(self, record: ReplicaRecord) -> Explanation:
        assignment = self._cluster.view.assignments.get((record.worker_id, record.model))
        at_unix_s = assignment.assigned_unix_s if assignment else 0.0
        return Explanation(
            at_unix_s=at_unix_s + record.timeline.total_s,
            subject=f"replica {record.model} on worker {record.worker_id}",
            decision=record.state.value,
            reason=record.error or _timeline_in_words(record),
            predicted_s=assignment.predicted_start_s if assignment else 0.0,
            measured_s=record.timeline.total_s,
        )


def _of_decided(decided: Decided) -> Explanation:
    decision = decided.decision
    return Explanation(
        at_unix_s=decision.at_unix_s,
        subject=f"model {decision.model}",
        decision=decision.decision,
        reason=decision.reason,
        rejected=decision.rejected,
        predicted_s=decision.predicted_start_s,
        measured_s=decided.measured_s,
    )


def _models_of(move: MoveRecord) -> tuple[ModelName, ModelName]:
    return move.model, move.for_model


def _of_move(move: MoveRecord) -> Explanation:
    return Explanation(
        at_unix_s=move.began_unix_s,
        subject=f"replica {move.model} on worker {move.worker_id}",
        decision="moves",
        reason=f"to worker {move.target}, so that {move.for_model} can start: {move.reason}",
        predicted_s=move.predicted_s,
    )


def _of_wish(wish: PrefetchRecord) -> Explanation:
    return Explanation(
        at_unix_s=wish.wished_unix_s,
        subject=f"model {wish.model} on node {wish.node_id}",
        decision=f"wished for in {wish.tier.value}",
        reason=wish.reason,
    )


def _of_demand(demand: DemandRecord) -> Explanation:
    batch = f", {demand.batch_jobs} of them batch" if demand.batch_jobs else ""
    return Explanation(
        at_unix_s=demand.since_unix_s,
        subject=f"model {demand.model}",
        decision="waits",
        reason=f"{demand.waiting_jobs} jobs at router {demand.router_id}{batch}",
    )


def _timeline_in_words(record: ReplicaRecord) -> str:
    if record.state is not ReplicaState.READY:
        return str(record.state.value)
    phases = record.timeline.phases()
    spent = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in phases)
    return f"started from {record.timeline.from_tier.value}: {spent}"
