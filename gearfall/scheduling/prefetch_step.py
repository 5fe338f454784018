"""The part of a decision step that fetches ahead: at its own times, over the fleet's index."""

from collections.abc import Collection

from gearfall.core.ids import ModelName, NodeId
from gearfall.scheduling.actions import Unwish, Wish
from gearfall.scheduling.fleet_state import FleetState
from gearfall.scheduling.prefetch import PrefetchPolicy, PrefetchScene, plan_prefetch


def prefetch_step(
    fleet: FleetState, policy: PrefetchPolicy | None, now_unix_s: float
) -> tuple[tuple[Wish | Unwish, ...], float | None]:
    """Return the wishes to write and to take back, and when to look next.

    Nothing before the next look is due. It never is while nothing ever came and nothing is wished,
    nor without a policy: then wishes that stand are taken back at once.
    """
    if policy is None:
        standing = sorted(fleet.records.prefetch)
        return tuple(Unwish(key, "nothing is fetched ahead") for key in standing), None
    if not fleet.loads and not fleet.records.prefetch:
        return (), None
    if now_unix_s < fleet.prefetch_due_unix_s:
        return (), fleet.prefetch_due_unix_s
    fleet.prefetch_due_unix_s = now_unix_s + policy.every_s
    return plan_prefetch(_scene(fleet), policy, now_unix_s), fleet.prefetch_due_unix_s


def _scene(fleet: FleetState) -> PrefetchScene:
    records = fleet.records

    def hosting(model: ModelName) -> Collection[NodeId]:
        workers = fleet.index.holders.get(model, ())
        return {records.workers[each].node_id for each in workers if each in records.workers}

    return PrefetchScene(
        fleet.model,
        records.nodes,
        records.prefetch,
        {name: load.arrivals for name, load in fleet.loads.items()},
        hosting=hosting,
        resident=lambda model: fleet.index.resident.get(model, ()),
    )
