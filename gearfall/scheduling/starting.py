"""Placing all that is missing together, and what each chosen place needs done."""

from dataclasses import replace

from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.records import AssignmentRecord, MoveRecord
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.placement.contention import ALIKE_S, Contender, choose_together
from gearfall.scheduling.placement.options import (
    Option,
    assess,
    find_options,
    may_host,
    with_nearer,
)
from gearfall.scheduling.placement.placement_reasons import Rejected, rejected_by, why_chosen
from gearfall.scheduling.placement.placement_search import Search
from gearfall.scheduling.placement.room_making import EVICTION_S, Way
from gearfall.scheduling.promises import (
    behind_own_s,
    has_patience,
    is_promise_kept,
    promise,
)
from gearfall.scheduling.scene import is_coming, predict
from gearfall.scheduling.scope import Scope
from gearfall.scheduling.step import CLAIM_S, Step

Settled = tuple[Contender, Option | None]

SWAP_S = 1.0
"""For so long nobody leaves room that is being made for room that would have to be made."""
FETCH_AHEAD = 1.5
"""Times the load before its room is free that bytes are brought where a model waits."""
SOON_S = 1e-3
"""What is that near is now: a look exactly on time would add up to less than a clock can tell."""
_NEVER_S = float("inf")
TOGETHER = 64
"""Models that are placed together; of more, the longest wait first."""


def place_all(step: Step, wants: list[Want], scope: Scope) -> None:
    """Place what is missing; one model's replicas one after the other."""
    left = sorted(wants, key=lambda want: (-want.urgency, want.since_unix_s, want.model.name))
    while left:
        chunk, later = _next_chunk(left)
        settled = _place_together(step, chunk, scope)
        left = [want for want in later if _is_open(want, settled.get(want.model.name))]
    step.fetch_nowhere_else()


def _next_chunk(wants: list[Want]) -> tuple[list[Want], list[Want]]:
    """Return what is placed together next, one of each model, and what is left.

    Nothing less urgent is placed before what is left: its room would have to be taken back.
    """
    chunk: dict[ModelName, Want] = {}
    later: list[Want] = []
    for want in wants:
        is_passed_over = bool(later) and want.urgency < later[0].urgency
        if want.model.name in chunk or len(chunk) >= TOGETHER or is_passed_over:
            later.append(want)
        else:
            chunk[want.model.name] = want
    return list(chunk.values()), later


def _is_open(want: Want, settled: Settled | None) -> bool:
    """Whether a want is worth a look after another one of its model was settled.

    What is wanted anywhere and what plans want on a node may be one replica: once one of them got a
    place, or waits for room, the other kind is counted anew in the next step.
    """
    if settled is None:
        return True
    contender, option = settled
    first = contender.want
    if (first.node_id is None) == (want.node_id is None):
        return first.node_id != want.node_id or (option is not None and option.way is Way.FREE)
    return option is None and (contender.is_served or first.node_id is not None)


def _place_together(step: Step, wants: list[Want], scope: Scope) -> dict[ModelName, Settled]:
    """Place at most one replica each; return what each model's want came to."""
    step.refresh()
    rivals = len(wants) - 1
    left = [_contender(step, want, scope.of(step.fleet, want), rivals) for want in wants]
    settled: dict[ModelName, Settled] = {}
    while left:
        touched: set[WorkerId] = set()
        for contender, option in choose_together(left, step.scene.policy, step.now_unix_s):
            if option is not None and option.touches & touched:
                continue  # its place was just taken in part: it is assessed anew below
            left.remove(contender)
            touched |= _take(step, contender, option)
            settled[contender.want.model.name] = contender, option
        if touched and left:
            step.refresh()
            for other in left:
                _look_again(step, other, touched)
    return settled


def _contender(
    step: Step, want: Want, workers: list[WorkerId] | None, rivals: int = 0
) -> Contender:
    behind_s = behind_own_s(step, want)
    if workers is None or want.rules.accelerators > 1:
        if is_promise_kept(step, want, behind_s):
            return Contender(want, [], behind_s=behind_s, is_promised=True)
        search = Search(step.fleet, want)
        below_s = behind_s if has_patience(step, want) else _NEVER_S
        options = find_options(step.scene, want, search, rivals, below_s)
        is_promised = not options and below_s < _NEVER_S
        return Contender(want, _worth_it(step, want, options), search, behind_s, is_promised)
    line = step.fleet.lines.place_of(want.model.name)
    if line is not None and may_host(step.scene, want, line):
        workers = sorted({*workers, line})  # it leaves the line for what is better only
    there = step.fleet.index.workers.get(want.node_id, set()) if want.node_id else set(workers)
    there = there - step.fleet.index.holders.get(want.model.name, set())
    found = [assess(step.scene, want, (each,)) for each in workers if each in there]
    options = sorted(filter(None, found), key=lambda option: option.rank)
    options = with_nearer(step.scene, want, options)
    claim = step.fleet.claims.of(want.model.name, want.node_id)
    if not options and not _moves_for(step, want) and claim is not None:
        step.fleet.dirty_workers |= step.fleet.claims.drop(want.model.name, want.node_id)
        step.refresh()
        return _contender(step, want, None, rivals)
    return Contender(want, _worth_it(step, want, options), behind_s=behind_s, is_limited=True)


def _worth_it(step: Step, want: Want, options: list[Option]) -> list[Option]:
    """Return the options that are worth leaving what is under way for.

    Of room that is made by a move, only what is sooner. Of room that somebody was just told to
    make, only what is free: else models could swap what they wait for without end.
    """
    moves, claim = _moves_for(step, want), step.fleet.claims.of(want.model.name, want.node_id)
    if not moves:
        if claim is None or step.now_unix_s >= claim.since_unix_s + SWAP_S:
            return options
        own = claim.bytes_by_worker.keys()
        return [each for each in options if each.way is Way.FREE or own >= set(each.workers)]
    free_in_s = max(each.began_unix_s + each.predicted_s for each in moves) - step.now_unix_s
    worker = step.fleet.records.workers.get(moves[0].worker_id)
    start = predict(step.scene, want.model, worker.node_id) if worker else None
    ready_in_s = _NEVER_S
    if worker is not None and start is not None:
        room_in_s = max(EVICTION_S, free_in_s)
        comes = is_coming(step.fleet, want.model.name, worker.node_id)
        ready_in_s = start.after_s(room_in_s) if comes else room_in_s + start.total_s
    return [each for each in options if each.way is Way.FREE and each.score < ready_in_s]


def _moves_for(step: Step, want: Want) -> list[MoveRecord]:
    moves = step.fleet.records.moves
    found = [moves[key] for key in step.fleet.index.moves.get(want.model.name, ())]
    return [move for move in found if move.for_model == want.model.name]


def _look_again(step: Step, contender: Contender, touched: set[WorkerId]) -> None:
    """Assess the options anew that depend on touched workers or on their nodes' stores."""
    records = step.fleet.records
    nodes = {records.workers[each].node_id for each in touched if each in records.workers}
    kept: list[Option] = []
    for option in contender.options:
        near = records.workers[option.workers[0]].node_id in nodes
        if not near and not (option.touches & touched):
            kept.append(option)
        elif (again := assess(step.scene, contender.want, option.workers)) is not None:
            kept.append(again)
    lost_s = min((each.score for each in kept), default=_NEVER_S) - ALIKE_S
    was_seen_whole = contender.search is not None
    if contender.options and (not kept or (was_seen_whole and contender.options[0].score < lost_s)):
        contender.search = Search(step.fleet, contender.want)
        found = find_options(step.scene, contender.want, contender.search)
        kept = _worth_it(step, contender.want, found)
    contender.options = sorted(kept, key=lambda option: option.rank)


def _take(step: Step, contender: Contender, best: Option | None) -> set[WorkerId]:
    """Do what an option needs; return the workers that it touches.

    Where only some workers were looked at, having none of them says nothing new.
    """
    want = contender.want
    model = want.model.name
    if best is None and contender.is_limited:
        return _block(step, want)
    step.fleet.lines.leave(model)
    if best is None and contender.is_served:
        promise(step, contender)
    if best is not None:
        _fetch(step, want, best)
    if best is None or best.way is Way.AWAIT:
        _wait(step, contender, best)
        return set() if best is None or best.ending else set(best.workers)
    if best.way is Way.FREE:
        step.forget_want(want, best.workers)
        _assign(step, contender, best)
        return set(best.workers)
    for victim in best.victims:
        why = f"makes room for {model}"
        step.unassign(victim.key, why)
        step.decide(victim.key[1], "stop", why, worker_id=victim.key[0])
    _begin_moves(step, want, best)
    _block(step, want)
    step.claim(want, best.workers, step.now_unix_s + best.wait_s + CLAIM_S)
    _note(step, contender, "wait" if best.way is Way.EVICT else "move", best)
    return best.touches


def _fetch(step: Step, want: Want, option: Option) -> None:
    """Have the bytes come to the place that is waited for; note where there is one."""
    node_id = step.fleet.records.workers[option.workers[0]].node_id
    if option.way is Way.FREE:
        step.started_on.setdefault(want.model.name, set()).add(node_id)
    elif option.fetches_ahead and option.prediction.load_s > 0.0:
        early_s = option.wait_s - FETCH_AHEAD * option.prediction.loaded_s
        # A move is left for free room only: no later look comes back to where it makes room.
        if early_s > SOON_S and option.way is not Way.MOVE:
            step.look_again(want.model.name, step.now_unix_s + early_s)
        else:
            step.fetch_ahead(want.model.name, node_id, "waits for a place there")


def _assign(step: Step, contender: Contender, option: Option) -> None:
    want = contender.want
    reason = why_chosen(option)
    if want.reason:
        reason += f"; kept warm for {want.reason}"
    group = option.workers if len(option.workers) > 1 else ()
    rejected = _rejected(step, contender, option)
    for worker_id in option.workers:
        step.assign(
            AssignmentRecord(
                worker_id,
                want.model.name,
                option.memory_bytes[worker_id],
                reason,
                step.now_unix_s,
                option.prediction.total_s,
                group,
            )
        )
    step.decide(
        want.model.name,
        "start",
        reason,
        worker_id=option.workers[0],
        predicted_start_s=option.prediction.total_s,
        rejected=rejected,
    )


def _begin_moves(step: Step, want: Want, option: Option) -> None:
    for transfer in option.transfers:
        worker_id, model = transfer.key
        move = MoveRecord(
            worker_id,
            model,
            transfer.target,
            want.model.name,
            f"{want.model.name} starts soonest on worker {worker_id}",
            step.now_unix_s,
            transfer.seconds,
        )
        step.begin_move(move)
        if transfer.start is not None and not step.start_move_target(move):
            step.end_move(transfer.key, f"worker {transfer.target} has no room any more")


def _wait(step: Step, contender: Contender, option: Option | None) -> None:
    want = contender.want
    _block(step, want)
    claim = step.fleet.claims.of(want.model.name, want.node_id)
    is_under_way = option and claim and claim.bytes_by_worker.keys() == set(option.workers)
    if _moves_for(step, want) or (is_under_way and option and not option.ending):
        return
    if option is not None and option.ending:
        step.fleet.lines.join(want.model.name, option.workers[0], want.since_unix_s)
        step.look_again(want.model.name, step.now_unix_s + option.wait_s)
    elif option is not None:
        step.claim(want, option.workers, step.now_unix_s + option.wait_s + CLAIM_S)
    _note(step, contender, "wait", option)


def _block(step: Step, want: Want) -> set[WorkerId]:
    """Remember who waits, and when it may do more as it waited long; touches no worker."""
    known = step.fleet.blocked.get(want.model.name, want)
    # Wanted on several nodes, it waits for room on any of them.
    is_same = known.node_id == want.node_id
    step.fleet.blocked[want.model.name] = want if is_same else replace(want, node_id=None)
    if want.urgency is Urgency.INTERACTIVE:
        policy = step.scene.policy
        for stay_s in (policy.patience_s, policy.starvation_s):
            at_unix_s = want.since_unix_s + stay_s
            if at_unix_s > step.now_unix_s:
                step.look_again(want.model.name, at_unix_s)
                break
    return set()


def _note(step: Step, contender: Contender, decision: str, option: Option | None) -> None:
    name = contender.want.model.name
    if option is not None:
        reason = why_chosen(option)
    elif contender.is_served:
        reason = "its own replicas serve what waits sooner than a new one could"
    elif _search_of(step, contender).finds_any:
        reason = "no worker has room and nothing may leave yet"
    else:
        reason = "no worker can host it"
    if step.stands(name, decision, reason):
        return
    step.decide(
        name,
        decision,
        reason,
        worker_id=option.workers[0] if option else "",
        predicted_start_s=option.seconds if option else 0.0,
        rejected=_rejected(step, contender, option),
    )


def _rejected(step: Step, contender: Contender, option: Option | None) -> Rejected:
    others = [each for each in contender.options if each is not option]
    search = _search_of(step, contender)
    return rejected_by(step.scene, contender.want, search, option, others)


def _search_of(step: Step, contender: Contender) -> Search:
    if contender.search is None:
        contender.search = Search(step.fleet, contender.want)
    return contender.search
