"""One decision step: the fleet and the time in, records to write and to delete out.

Order: assignments that can no longer hold go first; then moves go on; then every model that changed
or is due is scaled; then all that is missing is placed together. What one model takes or gives back
in this step counts for the models after it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import MoveRecord, ReplicaState
from gearfall.scheduling.actions import Action, Unwish, Wish
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.gear_step import follow_gears
from gearfall.scheduling.placement.moves import MOST_S, MoveStep, next_step
from gearfall.scheduling.placement.reopening import reopen
from gearfall.scheduling.prefetch_step import prefetch_step
from gearfall.scheduling.prefetching.prefetch import WishKey
from gearfall.scheduling.scaling.autoscaler import ScaleDecision, SchedulerPolicy, scale_model
from gearfall.scheduling.scaling.autoscaler_load import ModelLoad, advance_load
from gearfall.scheduling.scaling.gear_wishes import missing_on
from gearfall.scheduling.scene import Scene
from gearfall.scheduling.scope import Scope
from gearfall.scheduling.snapshot import ReplicaKey
from gearfall.scheduling.starting import place_all
from gearfall.scheduling.step import Step


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, in order, and when to look again though nothing changed."""

    actions: tuple[Action, ...]
    next_due_unix_s: float | None = None


def decide(fleet: Fleet, costs: StartCosts, policy: SchedulerPolicy, now_unix_s: float) -> Plan:
    """Return the steps towards what is wanted, looking only at what changed or is due.

    Never two assignments for one (worker, model), never more on a worker than it holds. The fleet's
    records stay as they are: the caller puts what it has written.
    """
    fleet.refresh(policy, now_unix_s)
    if follow_gears(Scene(fleet, costs, policy, now_unix_s)):
        fleet.refresh(policy, now_unix_s)
    due, dirty, sites = fleet.model_due.take(now_unix_s), fleet.take_dirty(), reopen(fleet)
    models = sorted(due | dirty | sites.keys())
    changed: set[ModelName] = set()
    for model in dirty & fleet.blocked.keys() - due:
        if claimed := fleet.claims.workers_of(model):
            # Room is being made for it: until that ends, only what grew can be better.
            sites.setdefault(model, sorted(claimed))
            changed.add(model)
    dirty -= changed
    step = Step(Scene(fleet, costs, policy, now_unix_s), fleet)
    for model in models:
        _drop_what_cannot_hold(step, model)
    fleet.refresh(policy, now_unix_s)
    for key in sorted({key for model in models for key in fleet.index.moves.get(model, ())}):
        _go_on_with_move(step, fleet.records.moves[key])
    wants = [want for model in models for want in _scale(step, model)]
    limits = {model: sites[model] for model in sites.keys() - dirty - due}
    place_all(step, wants, Scope(limits, changed))
    for model in models:
        known = fleet.model_due.get(model) if model in sites.keys() - dirty else None
        times = [each for each in (known, step.due_unix_s.get(model)) if each is not None]
        fleet.model_due.put(model, min(times, default=None))
    fleet.retract()
    wishes, look_unix_s = prefetch_step(fleet, policy.prefetch, now_unix_s)
    times = [each for each in (fleet.next_due_unix_s(), look_unix_s) if each is not None]
    settled = {_wish_key(each) for each in step.actions} - {None}
    left = (each for each in wishes if _wish_key(each) not in settled)
    return Plan((*step.actions, *left), min(times, default=None))


def _wish_key(action: Action) -> WishKey | None:
    """Return the wish that an action writes or takes back."""
    if isinstance(action, Wish):
        return action.prefetch.node_id, action.prefetch.model
    return action.key if isinstance(action, Unwish) else None


def _drop_what_cannot_hold(step: Step, model: ModelName) -> None:
    """Delete assignments of vanished workers and models, and of workers that give them back."""
    records, is_known = step.fleet.records, step.fleet.model(model) is not None
    for key in sorted(step.fleet.index.hosted.get(model, {})):
        if key not in records.assignments:
            continue
        replica, worker = records.replicas.get(key), records.workers.get(key[0])
        if not is_known:
            step.unassign(key, f"model {model} was removed")
        elif worker is None:
            _drop_unless_awaited(step, key)
        elif worker.max_replicas < 1 or (replica and replica.state is ReplicaState.DRAINING):
            step.unassign(key, f"worker {key[0]} is draining")
        elif not _is_whole(step, key):
            step.unassign(key, "its group is not whole")


def _is_whole(step: Step, key: ReplicaKey) -> bool:
    assignments = step.fleet.records.assignments
    group = assignments[key].group
    return not group or all((each, key[1]) in assignments for each in group)


def _drop_unless_awaited(step: Step, key: ReplicaKey) -> None:
    until_unix_s = step.fleet.records.awaited.get(key[0], step.now_unix_s)
    if until_unix_s > step.now_unix_s:
        step.look_again(key[1], until_unix_s)
    else:
        step.unassign(key, f"worker {key[0]} is gone")


def _go_on_with_move(step: Step, move: MoveRecord) -> None:
    decision = _decide_scale(step, move.for_model)
    is_wanted = decision is not None and decision.missing > 0
    next_, reason = next_step(step.scene, move, is_wanted=is_wanted)
    key = (move.worker_id, move.model)
    match next_:
        case MoveStep.START:
            if not step.start_move_target(move):
                step.end_move(key, f"worker {move.target} has no room any more")
        case MoveStep.LEAVE:
            step.unassign(key, f"moves to worker {move.target}: {reason}")
            step.decide(
                move.model, "stop", f"makes room for {move.for_model}: {reason}", worker_id=key[0]
            )
        case MoveStep.FINISH:
            step.end_move(key, reason)
        case MoveStep.GIVE_UP:
            step.end_move(key, reason)
            _take_back_arriving(step, move)
        case MoveStep.WAIT:
            pass
    if key in step.fleet.records.moves:
        step.look_again(move.for_model, move.began_unix_s + MOST_S)
        step.claim_for_move(move)


def _take_back_arriving(step: Step, move: MoveRecord) -> None:
    """Give back what was started for a move that is given up, unless it serves already."""
    hosted = step.fleet.index.hosted.get(move.model, {})
    arriving, leaving = hosted.get((move.target, move.model)), (move.worker_id, move.model)
    if arriving is None or arriving.is_ready or leaving not in hosted:
        return
    if arriving.assignment.assigned_unix_s >= move.began_unix_s:
        step.unassign(arriving.key, f"its move from worker {move.worker_id} was given up")


def _scale(step: Step, model: ModelName) -> list[Want]:
    """Give back what is too much of one model; return what is missing."""
    decision = _decide_scale(step, model)
    if decision is None:
        step.forget(model)
        return []
    _release_failing(step, model)
    for key, reason in decision.surplus:
        step.unassign(key, reason)
        step.decide(model, "stop", reason, worker_id=key[0])
    if decision.next_due_unix_s is not None:
        step.look_again(model, decision.next_due_unix_s)
    missing, urgency = decision.missing, _urgency(step, model)
    if missing == 0 and _must_evacuate(step, model):
        missing, urgency = 1, max(urgency, Urgency.EVACUATE)
    wants = _wants_of_gears(step, model)
    if missing:
        # Near where plans want it; which of the two kinds goes on is seen as they are placed.
        want = replace(_want(step, model, urgency), wished=_wished_nodes(step, model))
        firm = min(missing, decision.firm)
        wants = [want] * firm + [replace(want, may_queue=True)] * (missing - firm) + wants
    if not wants and model in step.fleet.index.hinted and not step.fleet.counted(model):
        wants = [_want(step, model, Urgency.KEEP)]  # where room is free; else only its bytes come
    if not wants:
        step.forget(model)
    elif step.fleet.claims.workers_of(model):
        step.keep_claims(model, {want.node_id for want in wants})
    return wants


def _wished_nodes(step: Step, model: ModelName) -> frozenset[NodeId]:
    """Return the nodes where gear plans would like to have another replica of a model."""
    wish = step.fleet.gears.get(model)
    return frozenset(_missing_on(step, model, wish.places) if wish else ())


def _wants_of_gears(step: Step, model: ModelName) -> list[Want]:
    """Return what gear plans miss of a model: for the gear in force, then for the one above."""
    wish = step.fleet.gears.get(model)
    if wish is None or not wish.by_node:
        return []
    return [
        replace(_want(step, model, urgency), node_id=node_id, reason=wish.reason)
        for urgency, wanted in ((Urgency.GEAR, wish.now), (Urgency.KEEP, wish.soon))
        for node_id in _missing_on(step, model, wanted)
    ]


def _missing_on(step: Step, model: ModelName, wanted: Iterable[tuple[NodeId, int]]) -> list[NodeId]:
    """Return what nodes lack of what plans want, and could have: one on each of their workers."""
    workers = step.fleet.index.workers
    most = [(node_id, min(count, len(workers.get(node_id, ())))) for node_id, count in wanted]
    return missing_on(most, step.fleet.by_node(model))


def _decide_scale(step: Step, model: ModelName) -> ScaleDecision | None:
    fleet = step.fleet
    if fleet.model(model) is None:
        fleet.loads.pop(model, None)
        return None
    load = fleet.loads.get(model, ModelLoad())
    records = fleet.index.load.get(model)
    if records or load.is_known:
        load = advance_load(load, (records or {}).values(), step.now_unix_s)
        fleet.loads[model] = load
    return scale_model(
        fleet.counted(model),
        fleet.index.waiting.get(model),
        fleet.limits_of(model),
        load,
        policy=step.scene.policy,
        now_unix_s=step.now_unix_s,
        kept=fleet.kept(model),
    )


def _want(step: Step, model: ModelName, urgency: Urgency) -> Want:
    record = step.fleet.model(model)
    assert record is not None, "only what may be placed is scaled"
    waiting, blocked = step.fleet.index.waiting.get(model), step.fleet.blocked.get(model)
    since_unix_s = blocked.since_unix_s if blocked else step.now_unix_s
    return Want(
        record,
        urgency,
        waiting.since_unix_s if waiting else since_unix_s,
        waiting.jobs if waiting else 1,
        step.fleet.rules_of(model),
    )


def _urgency(step: Step, model: ModelName) -> Urgency:
    waiting = step.fleet.index.waiting.get(model)
    if waiting is None:
        return Urgency.KEEP
    return Urgency.BATCH if waiting.batch_jobs >= waiting.jobs else Urgency.INTERACTIVE


def _must_evacuate(step: Step, model: ModelName) -> bool:
    """Whether its only replicas run jobs on workers that are leaving."""
    records, index = step.fleet.records, step.fleet.index
    if step.fleet.counted(model):
        return False
    for worker_id in index.holders.get(model, ()):
        worker, replica = records.workers.get(worker_id), records.replicas.get((worker_id, model))
        if worker and worker.max_replicas < 1 and replica and replica.running_jobs > 0:
            return True
    return False


def _release_failing(step: Step, model: ModelName) -> None:
    """Give failing replicas back after a while: whoever asks then gets new attempts."""
    stay_s = max(step.scene.policy.failing_stay_s, step.fleet.limits_of(model).keep_alive_s)
    for key, hosted in sorted(step.fleet.index.hosted.get(model, {}).items()):
        if not hosted.is_failing or hosted.replica is None:
            continue
        due_unix_s = hosted.replica.idle_since_unix_s + stay_s
        if due_unix_s > step.now_unix_s:
            step.look_again(model, due_unix_s)
            continue
        reason = f"did not start for {stay_s:g} s: {hosted.replica.error}"
        step.unassign(key, reason)
        step.decide(model, "stop", reason, worker_id=key[0])
