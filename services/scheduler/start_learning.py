"""Takes every start that replicas' records tell of into the costs, once."""

from collections.abc import Callable, Collection

from gearfall.core.records import AssignmentRecord, ModelRecord, ReplicaRecord, ReplicaState
from gearfall.scheduling.estimates.start_costs import Start, StartCosts, StartOutcome, learn_start
from gearfall.scheduling.snapshot import ReplicaKey


class StartLearning:
    """Owner of the costs of starts, and of which starts they hold already."""

    def __init__(self, on_outcome: Callable[[StartOutcome], None] = lambda _: None) -> None:
        """`on_outcome` gets each start whose time had been predicted."""
        self._on_outcome = on_outcome
        self._learned_from: dict[ReplicaKey, int] = {}
        self._counted: dict[ReplicaKey, float] = {}
        self.costs = StartCosts()

    def restore(self, costs: StartCosts) -> None:
        """Begin from what another scheduler has learned."""
        self.costs = costs
        self._learned_from.clear()
        self._counted.clear()

    def skip(self, replica: ReplicaRecord, assignment: AssignmentRecord) -> None:
        """Note a start that the restored costs hold already."""
        key = (replica.worker_id, replica.model)
        self._learned_from[key] = replica.pid
        self._counted[key] = assignment.assigned_unix_s

    def take(
        self,
        replica: ReplicaRecord,
        assignment: AssignmentRecord | None,
        model: ModelRecord | None,
    ) -> None:
        """Take in one replica's start, unless it has none to tell of or was seen before."""
        key, timeline = (replica.worker_id, replica.model), replica.timeline
        is_ready = replica.state is ReplicaState.READY and timeline.total_s > 0
        if not is_ready or model is None or self._learned_from.get(key) == replica.pid:
            return
        self._learned_from[key] = replica.pid
        predicted_s = self._prediction(key, assignment)
        start = Start(
            replica.model,
            model.size_bytes,
            replica.node_id,
            replica.worker_id,
            timeline,
            predicted_s,
        )
        self.costs = learn_start(self.costs, start)
        if predicted_s > 0:
            self._on_outcome(self.costs.outcomes[-1])

    def forget(self, key: ReplicaKey) -> None:
        """The replica is gone: another one of that model on that worker is a new start."""
        self._learned_from.pop(key, None)
        self._counted.pop(key, None)

    def forget_absent(self, present: Collection[ReplicaKey]) -> None:
        """Forget all replicas but these."""
        for key in self._learned_from.keys() - present:
            self.forget(key)

    def _prediction(self, key: ReplicaKey, assignment: AssignmentRecord | None) -> float:
        """Return what the assignment predicted; a restart after a crash was predicted by none."""
        if assignment is None or self._counted.get(key) == assignment.assigned_unix_s:
            return 0.0
        self._counted[key] = assignment.assigned_unix_s
        return assignment.predicted_start_s
