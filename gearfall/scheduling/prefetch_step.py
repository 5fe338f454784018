"""The part of a decision step that fetches ahead: at its own times, over the fleet's index."""

from collections.abc import Collection

from gearfall.core.ids import ModelName, NodeId
from gearfall.scheduling.actions import Unwish, Wish
from gearfall.scheduling.fleet.fleet_state import FleetState
from gearfall.scheduling.prefetching.forecast import ArrivalHistory
from gearfall.scheduling.prefetching.prefetch import PrefetchPolicy, PrefetchScene, plan_prefetch

_NOTHING_CAME = ArrivalHistory()


def prefetch_step(
    fleet: FleetState, policy: PrefetchPolicy | None, now_unix_s: float
) -> tuple[tuple[Wish | Unwish, ...], float | None]:
    """Return the wishes to write and to take back, and when to look next.

    Nothing before the next look is due, but for models that are hinted at: those are looked at in
    every step until they are near. It never is due while nothing ever came and nothing is wished,
    nor without a policy: then wishes that stand are taken back at once.
    """
    if policy is None:
        standing = sorted(fleet.records.prefetch)
        return tuple(Unwish(key, "nothing is fetched ahead") for key in standing), None
    urgent = _urgent(fleet)[: policy.most_models]
    if not fleet.loads and not fleet.records.prefetch:
        return plan_prefetch(_scene(fleet, urgent), policy, now_unix_s) if urgent else (), None
    if now_unix_s < fleet.prefetch_due_unix_s:
        actions = plan_prefetch(_scene(fleet, urgent), policy, now_unix_s) if urgent else ()
        return actions, fleet.prefetch_due_unix_s
    candidates = list({*urgent, *_next_candidates(fleet, policy.most_models)})
    share = min(1.0, policy.most_models / max(1, len(fleet.loads)))
    fleet.prefetch_due_unix_s = now_unix_s + policy.every_s * share
    actions = plan_prefetch(_scene(fleet, candidates), policy, now_unix_s)
    return actions, fleet.prefetch_due_unix_s


def _urgent(fleet: FleetState) -> list[ModelName]:
    """Return what is hinted at and neither near nor wished for yet."""
    wished = {model for _, model in fleet.records.prefetch} if fleet.index.hinted else ()
    return sorted(
        model
        for model in fleet.index.hinted
        if model not in wished and model not in fleet.index.resident
    )


def _next_candidates(fleet: FleetState, most: int) -> list[ModelName]:
    """Return whose turn it is; all have had theirs before anyone has another."""
    if not fleet.prefetch_turns:
        wished = {model for _, model in fleet.records.prefetch}
        fleet.prefetch_turns.extend({**fleet.loads, **dict.fromkeys(wished)})
    return [fleet.prefetch_turns.popleft() for _ in range(min(most, len(fleet.prefetch_turns)))]


def _knows_its_place(fleet: FleetState, model: ModelName) -> bool:
    """Whether it is known where a model that waits will start: in a line, or where room is made."""
    return fleet.lines.place_of(model) is not None or bool(fleet.claims.workers_of(model))


def _scene(fleet: FleetState, candidates: list[ModelName]) -> PrefetchScene:
    records = fleet.records

    def hosting(model: ModelName) -> Collection[NodeId]:
        workers = fleet.index.holders.get(model, ())
        return {records.workers[each].node_id for each in workers if each in records.workers}

    def history(model: ModelName) -> ArrivalHistory:
        load = fleet.loads.get(model)
        return load.arrivals if load is not None else _NOTHING_CAME

    return PrefetchScene(
        fleet.model,
        records.nodes,
        records.prefetch,
        candidates,
        history,
        source=lambda model, node: fleet.source_tier(model, node.node_id),
        hosting=hosting,
        resident=lambda model: fleet.index.resident.get(model, ()),
        hinted=frozenset(fleet.index.hinted),
        waiting=fleet.index.waiting.keys(),
        placed=frozenset(each for each in fleet.index.hinted if _knows_its_place(fleet, each)),
    )
