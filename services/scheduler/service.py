"""What a scheduler answers, leading or not: who leads, and why a model is where it is."""

from dataclasses import dataclass

from gearfall.core.errors import NotFound
from gearfall.core.ids import ModelName
from gearfall.core.records import DecisionRecord, ReplicaRecord, ReplicaState
from gearfall.infra.cluster import Cluster
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

    def __init__(self, cluster: Cluster, loop: SchedulerLoop, scheduler_id: str) -> None:
        self._cluster = cluster
        self._loop = loop
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
        """Return the last decision about a model and its replicas' starts, newest first.

        For a LoRA adapter those of its base, on whose replicas it runs. Raises NotFound for a model
        that is not registered.
        """
        view = self._cluster.view
        if model not in view.models:
            raise NotFound(f"model {model!r} is not registered", param="model")
        model = ModelName(view.models[model].base) or model
        replicas = [record for record in view.replicas.values() if record.model == model]
        found = [self._of_replica(record) for record in replicas]
        if decision := view.decisions.get(model):
            found.append(_of_decision(decision, replicas))
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


def _of_decision(decision: DecisionRecord, replicas: list[ReplicaRecord]) -> Explanation:
    measured_s = next(
        (r.timeline.total_s for r in replicas if r.worker_id == decision.worker_id), 0.0
    )
    return Explanation(
        at_unix_s=decision.at_unix_s,
        subject=f"model {decision.model}",
        decision=decision.decision,
        reason=decision.reason,
        rejected=decision.rejected,
        predicted_s=decision.predicted_start_s,
        measured_s=measured_s if decision.decision == "start" else 0.0,
    )


def _timeline_in_words(record: ReplicaRecord) -> str:
    if record.state is not ReplicaState.READY:
        return str(record.state.value)
    phases = record.timeline.phases()
    spent = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in phases)
    return f"started from {record.timeline.from_tier.value}: {spent}"
