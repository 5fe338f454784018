"""What the gears in force ask of this worker's claims, read from cluster state as it changes."""

from gearfall.core.gears.claim_rule import ClaimRule, claim_rule
from gearfall.core.gears.gear_plan import Gear
from gearfall.core.gears.gears_in_force import PlanShelf
from gearfall.core.ids import ModelName, WorkerId
from gearfall.infra.state.cluster import Cluster


class GearRules:
    """Owner of what was worked out last; asked before each claim, it looks at what changed."""

    def __init__(self, cluster: Cluster, worker_id: WorkerId) -> None:
        self._cluster = cluster
        self._worker_id = worker_id
        self._shelf = PlanShelf()
        self._gears: tuple[Gear, ...] = ()
        self._rules: dict[ModelName, ClaimRule] = {}
        self._seen: tuple[object, ...] = ()

    def rule_for(self, model: ModelName) -> ClaimRule:
        """Return how jobs of a model are to be claimed now."""
        view = self._cluster.view
        if not view.gear_plans:
            return ClaimRule()
        # A table of the view is another object as soon as a record of its kind changed.
        tables = (view.gear_plans, view.gear_votes, view.workers, view.replicas)
        if len(self._seen) != len(tables) or any(
            seen is not now for seen, now in zip(self._seen, tables, strict=True)
        ):
            self._seen = tables
            nodes = {worker.node_id for worker in view.workers.values()}
            found = self._shelf.read(view.gear_plans, view.gear_votes, nodes)
            self._gears = tuple(each.gear for each in found.values())
            self._rules = {}
        if model not in self._rules:
            replicas = (each for each in view.replicas.values() if each.model == model)
            self._rules[model] = claim_rule(model, self._worker_id, self._gears, replicas)
        return self._rules[model]
