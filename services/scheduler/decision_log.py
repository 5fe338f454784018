"""The last decisions about each model, with the starts that came of them: in memory, on every
scheduler alike, so that whoever leads next can tell what was decided before."""

import contextlib
from collections import OrderedDict, deque
from dataclasses import dataclass

from gearfall.core.ids import ModelName
from gearfall.core.records import DecisionRecord, ReplicaRecord, ReplicaState
from gearfall.infra.state.change_feed import Changes
from gearfall.infra.state.cluster import Cluster

KEPT_DECISIONS = 16
"""Of one model."""
KEPT_MODELS = 2048


@dataclass(slots=True)
class Decided:
    """One decision and what came of it."""

    decision: DecisionRecord
    measured_s: float = 0.0
    """Of the start that it led to; 0 while unknown."""


class DecisionLog:
    """Follows the decisions in cluster state."""

    def __init__(self, kept_models: int = KEPT_MODELS) -> None:
        self._kept_models = kept_models
        self._decided: OrderedDict[ModelName, deque[Decided]] = OrderedDict()

    async def run(self, cluster: Cluster) -> None:
        """Follow the cluster until it is stopped."""
        async with contextlib.aclosing(cluster.record_changes()) as changes:
            async for each in changes:
                self.take_in(each)

    def take_in(self, changes: Changes) -> None:
        """Note new decisions, and how long the starts took that they led to."""
        view = changes.restart
        if view is not None:
            for decision in view.decisions.values():
                self._note(decision)
            for replica in view.replicas.values():
                self._measure(replica)
        for change in changes.records:
            if isinstance(change.record, DecisionRecord):
                self._note(change.record)
            elif isinstance(change.record, ReplicaRecord):
                self._measure(change.record)

    def of(self, model: ModelName) -> tuple[Decided, ...]:
        """Return the decisions about a model, newest first."""
        return tuple(reversed(self._decided.get(model, ())))

    def _note(self, decision: DecisionRecord) -> None:
        kept = self._decided.setdefault(decision.model, deque(maxlen=KEPT_DECISIONS))
        if kept and kept[-1].decision == decision:
            return
        kept.append(Decided(decision))
        self._decided.move_to_end(decision.model)
        while len(self._decided) > self._kept_models:
            self._decided.popitem(last=False)

    def _measure(self, replica: ReplicaRecord) -> None:
        """Give the last start on that worker its time, once it is ready."""
        if replica.state is not ReplicaState.READY:
            return
        for decided in reversed(self._decided.get(replica.model, ())):
            made = decided.decision
            if (made.decision, made.worker_id) == ("start", replica.worker_id):
                decided.measured_s = decided.measured_s or replica.timeline.total_s
                return
