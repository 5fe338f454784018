"""Who decides in a simulated fleet: the scheduler's rules with a memory, as its loop keeps them."""

from typing import Any, Protocol

from gearfall.core.records import AssignmentRecord, ModelRecord, ReplicaRecord, ReplicaState
from gearfall.scheduling.baselines.baseline import DecideStep
from gearfall.scheduling.estimates.start_costs import Start, StartCosts, StartOutcome, learn_start
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.reconcile import Plan, decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy

NOTHING_LEARNED = StartCosts()


class Controller(Protocol):
    """What a world tells of and asks."""

    def put(self, kind: str, record: Any) -> None:
        """A record is now so."""
        ...

    def remove(self, kind: str, record_id: Any) -> None:
        """A record is gone."""
        ...

    def decide(self, now_s: float) -> Plan:
        """Return what is to be done now."""
        ...


class NoController:
    """Decides nothing: of a fleet whose replicas all stand from the beginning."""

    def put(self, kind: str, record: Any) -> None:
        """Nothing is kept."""

    def remove(self, kind: str, record_id: Any) -> None:
        """Nothing is kept."""

    def decide(self, now_s: float) -> Plan:
        """Return nothing to do."""
        del now_s
        return Plan(())


class FleetController:
    """Owner of a fleet's records and of what starts have taught."""

    def __init__(
        self,
        policy: SchedulerPolicy,
        step: DecideStep = decide,
        costs: StartCosts = NOTHING_LEARNED,
    ) -> None:
        """`step` decides; it is the scheduler's own unless another policy is to be compared."""
        self.fleet = Fleet()
        self.costs = costs
        self.outcomes: list[StartOutcome] = []
        """Every start with its prediction."""
        self._policy = policy
        self._step = step
        self._models: dict[str, ModelRecord] = {}
        self._assignments: dict[Any, AssignmentRecord] = {}
        self._learned_from: set[tuple[Any, int]] = set()

    def put(self, kind: str, record: Any) -> None:
        """Note a record."""
        self.fleet.put(kind, record)
        if kind == "models":
            self._models[record.name] = record
        elif kind == "assignments":
            self._assignments[record.worker_id, record.model] = record
        elif kind == "replicas":
            self._learn(record)

    def remove(self, kind: str, record_id: Any) -> None:
        """Note that a record is gone."""
        self.fleet.remove(kind, record_id)
        if kind == "assignments":
            self._assignments.pop(record_id, None)

    def decide(self, now_s: float) -> Plan:
        """Make one decision."""
        return self._step(self.fleet, self.costs, self._policy, now_s)

    def _learn(self, replica: ReplicaRecord) -> None:
        key = (replica.worker_id, replica.model)
        assignment = self._assignments.get(key)
        if replica.state is not ReplicaState.READY or assignment is None:
            return
        if (key, replica.pid) in self._learned_from:
            return
        self._learned_from.add((key, replica.pid))
        start = Start(
            replica.model,
            self._models[replica.model].size_bytes,
            replica.node_id,
            replica.worker_id,
            replica.timeline,
            assignment.predicted_start_s,
        )
        self.costs = learn_start(self.costs, start)
        self.outcomes.append(self.costs.outcomes[-1])
