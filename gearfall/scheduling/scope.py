"""How far a step looks for places: at all workers, or only where something came to be better."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gearfall.core.ids import ModelName, WorkerId
from gearfall.scheduling.fleet.fleet_state import FleetState
from gearfall.scheduling.fleet.wants import Want


@dataclass(frozen=True, slots=True)
class Scope:
    """The only workers worth a look, for models that are not looked at everywhere."""

    workers: Mapping[ModelName, list[WorkerId]]
    changed: Collection[ModelName]
    """Of those, models that changed: these workers do only for a want that has claimed some."""

    def of(self, fleet: FleetState, want: Want) -> list[WorkerId] | None:
        """Return the workers worth a look for a want; None for all."""
        model = want.model.name
        if model in self.changed and fleet.claims.of(model, want.node_id) is None:
            return None
        return self.workers.get(model)
