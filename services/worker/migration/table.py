"""A live migration: one pure state machine for each of its two workers.

The source owns the job until its router says that the target does. Until it asks the router, any
failure leaves the job where it is; from then on only the router's answer counts.

    source            | event                         | next: effects
    offered           | accepted                      | moving: by KV pin, else round 1
    moving            | stored                        | moving: by KV the first time, round 1
    moving            | progress                      | moving: the next round
                      |                               | freezing: the gap is small: freeze
                      |                               | ended: no round is left: abort
    freezing          | frozen                        | frozen: send the rest, then freeze
    frozen            | ready                         | asking: ask the router
    asking            | handed over                   | ended: commit
    asking            | kept                          | ended: abort, thaw
    asking            | job gone                      | ended: abort if its router said so
    (owning)          | refused, target lost, expired | ended: thaw, unpin
    (owning)          | job gone                      | ended: abort, unpin
    (owning)          | produced                      | same
    freezing, frozen  | stored                        | same
    (owning): offered, moving, freezing, frozen

    target            | event                         | next: effects
    opening           | connected                     | holding: hold
    holding           | held                          | held: accept
    held              | held                          | held: by tokens progress, if all is computed
    held              | tokens came                   | held: feed, by KV progress
                      | kv came                       | held: if a round is whole feed, progress
    held              | freeze came                   | completing, or ready
    completing        | kv came                       | ready: feed, release, send ready
    ready             | granted                       | owner: what was held back goes out
    owner             | pushed                        | ended: send resumed
    owner             | source lost                   | ended
    (holding)         | source lost                   | ended: drop
    (holding), ready  | aborted, expired              | ended: drop
    (holding), ready  | refused                       | ended: drop, send refused
    (holding), ready, owner | job gone                | ended: send refused
    opening, holding  | tokens came, kv came, freeze came | ended: drop, send refused
    (holding): opening, holding, held, completing

Pairs that are not listed change nothing. A target that is ready outlives its source: that one may
have asked the router.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

from services.worker.migration.events import (
    Aborted,
    Accept,
    Accepted,
    AskRouter,
    Connected,
    End,
    Expired,
    Feed,
    FreezeCame,
    Frozen,
    Granted,
    HandedOver,
    Held,
    JobGone,
    Kept,
    KvCame,
    Produced,
    Progress,
    Pushed,
    Ready,
    Refused,
    Release,
    SendBlocks,
    SendFreeze,
    SendProgress,
    SendReady,
    SendRefused,
    SendResumed,
    SendTokens,
    SetTimer,
    SourceAct,
    SourceEffect,
    SourceEvent,
    SourceLost,
    Stored,
    TargetAct,
    TargetEffect,
    TargetEvent,
    TargetLost,
    TokensCame,
)

_State = TypeVar("_State")
_Step = TypeVar("_Step")


@dataclass(frozen=True, slots=True)
class Terms:
    """Limits of a migration."""

    freeze_gap_tokens: int = 4
    """By tokens: the source freezes when the target lacks at most so many."""
    freeze_gap_kv_tokens: int = 64
    """By KV: the source freezes when at most so many tokens' keys and values are not there."""
    most_rounds: int = 32
    worst_gap_tokens: int = 64
    """When the rounds are used up: freeze with at most this gap, else give up."""
    move_limit_s: float = 60.0
    """From the offer to the freeze."""
    freeze_limit_s: float = 2.0
    """From the freeze to the target's `ready`."""
    ready_limit_s: float = 10.0
    """How long a target waits for the router's word."""


class SourceState(Enum):
    """How far the source has come."""

    OFFERED = "offered"
    MOVING = "moving"
    FREEZING = "freezing"
    FROZEN = "frozen"
    ASKING = "asking"
    """The router was asked; only its answer counts."""
    ENDED = "ended"


class TargetState(Enum):
    """How far the target has come."""

    OPENING = "opening"
    """Its push stream to the job's router is not open yet."""
    HOLDING = "holding"
    """The engine was asked to hold the job."""
    HELD = "held"
    COMPLETING = "completing"
    """The source is frozen; some of what it sent is still on its way."""
    READY = "ready"
    """The job runs with its output held back."""
    OWNER = "owner"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Source:
    """The source's part of one migration."""

    terms: Terms
    by_kv: bool
    block_tokens: int
    produced: int
    """Index of the token that follows what was pushed."""
    sent: int
    """Tokens before it were sent to the target; at first those of the offer."""
    state: SourceState = SourceState.OFFERED
    stored_kv: int = 0
    sent_kv: int = 0
    rounds: int = 0


SourceStep = tuple[Source, tuple[SourceEffect, ...]]


def step_source(source: Source, event: SourceEvent) -> SourceStep:
    """Return the source after `event` and what it does about it."""
    rule = SOURCE_RULES.get((source.state, type(event)))
    return rule(source, event) if rule else (source, ())


def _note_produced(source: Source, event: Produced) -> SourceStep:
    return replace(source, produced=max(source.produced, event.next_index)), ()


def _note_stored(source: Source, event: Stored) -> SourceStep:
    return replace(source, stored_kv=max(source.stored_kv, event.kv_tokens)), ()


def _store(source: Source, event: Stored) -> SourceStep:
    source, _ = _note_stored(source, event)
    is_first = source.by_kv and source.rounds == 0 and event.kv_tokens > 0
    return _send_round(source) if is_first else (source, ())


def _accept(source: Source, event: Accepted) -> SourceStep:
    moving = replace(source, state=SourceState.MOVING, sent_kv=event.kv_tokens)
    return (moving, (SourceAct.PIN,)) if source.by_kv else _send_round(moving)


def _send_round(source: Source) -> SourceStep:
    """Send what is new: tokens, and by KV the full blocks."""
    end_kv = 0
    if source.by_kv:
        full = source.stored_kv // source.block_tokens * source.block_tokens
        end_kv = max(full, source.sent_kv)
    number = source.rounds + 1
    effects: list[SourceEffect] = [SendTokens(number, source.sent, source.produced, end_kv)]
    if end_kv > source.sent_kv:
        effects.append(SendBlocks(source.sent_kv, end_kv))
    sent = replace(source, rounds=number, sent=source.produced, sent_kv=end_kv)
    return sent, tuple(effects)


def _advance(source: Source, progress: Progress) -> SourceStep:
    terms = source.terms
    if source.by_kv:
        gap, wanted = source.stored_kv - progress.kv_tokens, terms.freeze_gap_kv_tokens
    else:
        gap, wanted = source.produced - progress.next_index, terms.freeze_gap_tokens
    if gap > wanted and source.rounds < terms.most_rounds:
        return _send_round(source)
    if gap > max(wanted, terms.worst_gap_tokens):
        return _stay(source, f"the target did not catch up: {gap} tokens behind", abort=True)
    freezing = replace(source, state=SourceState.FREEZING)
    return freezing, (SourceAct.FREEZE, SetTimer(terms.freeze_limit_s))


def _send_rest(source: Source, frozen: Frozen) -> SourceStep:
    if frozen.next_index != source.produced:
        reason = f"frozen at {frozen.next_index}, but {source.produced} tokens were pushed"
        return _stay(source, reason, abort=True)
    kv_tokens = max(frozen.kv_tokens, source.sent_kv) if source.by_kv else 0
    effects: list[SourceEffect] = []
    if source.sent < source.produced:
        effects.append(SendTokens(source.rounds + 1, source.sent, source.produced, kv_tokens))
    if kv_tokens > source.sent_kv:
        effects.append(SendBlocks(source.sent_kv, kv_tokens))
    effects.append(SendFreeze(source.produced, kv_tokens))
    last = replace(source, state=SourceState.FROZEN, sent=source.produced, sent_kv=kv_tokens)
    return last, tuple(effects)


def _ask(source: Source, ready: Ready) -> SourceStep:
    if ready.next_index != source.produced:
        return _stay(source, f"the target is ready at {ready.next_index}", abort=True)
    asking = replace(source, state=SourceState.ASKING)
    return asking, (AskRouter(ready.next_index), SetTimer(0.0))


def _commit(source: Source, _event: HandedOver) -> SourceStep:
    ended = replace(source, state=SourceState.ENDED)
    return ended, (SourceAct.COMMIT, SourceAct.UNPIN, End())


def _keep(source: Source, event: Kept) -> SourceStep:
    acts = (SourceAct.ABORT, SourceAct.THAW, SourceAct.UNPIN)
    end = End(f"the router kept the job here: {event.reason}")
    return replace(source, state=SourceState.ENDED), (*acts, end)


def _leave(source: Source, event: JobGone) -> SourceStep:
    end = End(f"the job left: {event.reason}")
    acts = (SourceAct.ABORT, SourceAct.UNPIN, end)
    return replace(source, state=SourceState.ENDED), acts


def _leave_asking(source: Source, event: JobGone) -> SourceStep:
    """Without the router's word the target may be the owner: it waits for that word itself."""
    if event.is_certain:
        return _leave(source, event)
    end = End(f"the router's answer was lost: {event.reason}")
    return replace(source, state=SourceState.ENDED), (SourceAct.UNPIN, end)


def _lose_target(source: Source, event: Refused | TargetLost) -> SourceStep:
    return _stay(source, event.reason, abort=False)


def _expire_source(source: Source, _event: Expired) -> SourceStep:
    return _stay(source, f"it took too long while {source.state.value}", abort=True)


def _stay(source: Source, reason: str, *, abort: bool) -> SourceStep:
    """End with the job here."""
    acts: list[SourceEffect] = [SourceAct.ABORT] if abort else []
    if source.state in {SourceState.FREEZING, SourceState.FROZEN}:
        acts.append(SourceAct.THAW)
    if source.state is not SourceState.OFFERED:
        acts.append(SourceAct.UNPIN)
    return replace(source, state=SourceState.ENDED), (*acts, End(reason))


def _rows(
    states: Iterable[_State], events: Iterable[type], rule: Callable[..., _Step]
) -> dict[tuple[_State, type], Callable[..., _Step]]:
    return {(state, event): rule for state in states for event in events}


_S = SourceState
_OWNING = (_S.OFFERED, _S.MOVING, _S.FREEZING, _S.FROZEN)
SOURCE_RULES: dict[tuple[SourceState, type], Callable[..., SourceStep]] = {
    (_S.OFFERED, Accepted): _accept,
    (_S.MOVING, Stored): _store,
    (_S.MOVING, Progress): _advance,
    (_S.FREEZING, Frozen): _send_rest,
    (_S.FROZEN, Ready): _ask,
    (_S.ASKING, HandedOver): _commit,
    (_S.ASKING, Kept): _keep,
    (_S.ASKING, JobGone): _leave_asking,
    **_rows(_OWNING, (Refused, TargetLost), _lose_target),
    **_rows(_OWNING, (Expired,), _expire_source),
    **_rows(_OWNING, (JobGone,), _leave),
    **_rows(_OWNING, (Produced,), _note_produced),
    **_rows((_S.FREEZING, _S.FROZEN), (Stored,), _note_stored),
}


@dataclass(frozen=True, slots=True)
class Target:
    """The target's part of one migration."""

    terms: Terms
    by_kv: bool
    prompt_tokens: int
    known: int
    """Tokens before it came from the source; at first those of the offer."""
    state: TargetState = TargetState.OPENING
    came_kv: int = 0
    round: int = 0
    round_end: int = -1
    """The open round is whole when the tokens before it are; -1: none is open."""
    round_kv: int = 0
    frozen_kv: int = 0
    fed_kv: int = 0
    """The engine was told that keys and values of so many tokens are there."""


TargetStep = tuple[Target, tuple[TargetEffect, ...]]


def step_target(target: Target, event: TargetEvent) -> TargetStep:
    """Return the target after `event` and what it does about it."""
    rule = TARGET_RULES.get((target.state, type(event)))
    return rule(target, event) if rule else (target, ())


def _hold(target: Target, _event: Connected) -> TargetStep:
    return replace(target, state=TargetState.HOLDING), (TargetAct.HOLD,)


def _accept_offer(target: Target, held: Held) -> TargetStep:
    came = held.kv_tokens if target.by_kv else 0
    return replace(target, state=TargetState.HELD, came_kv=came), (Accept(came),)


def _note_computed(target: Target, held: Held) -> TargetStep:
    """By tokens: a round is whole when all its tokens but the last are computed."""
    is_computed = held.kv_tokens >= target.prompt_tokens + held.next_index - 1
    if target.by_kv or not is_computed or not 0 <= target.round_end <= held.next_index:
        return target, ()
    closed = replace(target, round_end=-1)
    return closed, (SendProgress(target.round, held.next_index, 0),)


def _take_tokens(target: Target, event: TokensCame) -> TargetStep:
    if not (event.start == target.known <= event.end):
        reason = f"tokens {event.start} to {event.end} do not continue {target.known}"
        return _refuse(target, Refused(reason))
    # Fed even if empty: the engine reports what it has computed when it is asked.
    opened = replace(
        target,
        known=event.end,
        round=target.round + 1,
        round_end=event.end,
        round_kv=event.kv_tokens,
    )
    fed, feed = _feed(opened, target.known)
    after, effects = _close_kv_round(fed)
    return after, (feed, *effects)


def _take_kv(target: Target, event: KvCame) -> TargetStep:
    """The engine hears of it when the round is whole: each word to it costs those that run."""
    came = replace(target, came_kv=max(target.came_kv, event.kv_tokens))
    after, progress = _close_kv_round(came)
    if not progress:
        return after, ()
    fed, feed = _feed(after, after.known)
    return fed, (feed, *progress)


def _complete(target: Target, event: KvCame) -> TargetStep:
    return _release_if_whole(replace(target, came_kv=max(target.came_kv, event.kv_tokens)))


def _feed(target: Target, start: int) -> tuple[Target, Feed]:
    """Tell the engine the tokens from `start` on and how far their keys and values are there."""
    there = min(target.came_kv, target.prompt_tokens + target.known)
    return replace(target, fed_kv=there), Feed(start, target.known, there)


def _close_kv_round(target: Target) -> TargetStep:
    if not target.by_kv or target.round_end < 0 or target.came_kv < target.round_kv:
        return target, ()
    closed = replace(target, round_end=-1)
    return closed, (SendProgress(target.round, target.known, target.came_kv),)


def _take_freeze(target: Target, event: FreezeCame) -> TargetStep:
    if event.next_index != target.known:
        reason = f"frozen at {event.next_index}, but tokens before {target.known} came"
        return _refuse(target, Refused(reason))
    return _release_if_whole(
        replace(target, state=TargetState.COMPLETING, frozen_kv=event.kv_tokens)
    )


def _release_if_whole(target: Target) -> TargetStep:
    if target.came_kv < target.frozen_kv:
        return target, ()
    at = target.known
    effects: list[TargetEffect] = [Release(at), SendReady(at), SetTimer(target.terms.ready_limit_s)]
    fed, feed = _feed(target, at)
    if fed.fed_kv > target.fed_kv:
        effects.insert(0, feed)
    return replace(fed, state=TargetState.READY), tuple(effects)


def _own(target: Target, _event: Granted) -> TargetStep:
    return replace(target, state=TargetState.OWNER), (SetTimer(0.0),)


def _resume(target: Target, event: Pushed) -> TargetStep:
    return replace(target, state=TargetState.ENDED), (SendResumed(event.next_index), End())


def _leave_owner(target: Target, _event: SourceLost) -> TargetStep:
    return replace(target, state=TargetState.ENDED), (End(),)


def _let_go(target: Target, event: JobGone) -> TargetStep:
    end = End(event.reason)
    return replace(target, state=TargetState.ENDED), (SendRefused(event.reason), end)


def _refuse(target: Target, event: Refused) -> TargetStep:
    effects = (TargetAct.DROP, SendRefused(event.reason), End(event.reason))
    return replace(target, state=TargetState.ENDED), effects


def _refuse_early(target: Target, event: TargetEvent) -> TargetStep:
    return _refuse(target, Refused(f"{type(event).__name__} came while {target.state.value}"))


def _drop(target: Target, event: SourceLost | Aborted | Expired) -> TargetStep:
    if isinstance(event, Expired):
        reason = f"it took too long while {target.state.value}"
    else:
        reason = f"the source gave up: {event.reason}"
    return replace(target, state=TargetState.ENDED), (TargetAct.DROP, End(reason))


_T = TargetState
_HOLDING = (_T.OPENING, _T.HOLDING, _T.HELD, _T.COMPLETING)
TARGET_RULES: dict[tuple[TargetState, type], Callable[..., TargetStep]] = {
    (_T.OPENING, Connected): _hold,
    (_T.HOLDING, Held): _accept_offer,
    (_T.HELD, Held): _note_computed,
    (_T.HELD, TokensCame): _take_tokens,
    (_T.HELD, KvCame): _take_kv,
    (_T.HELD, FreezeCame): _take_freeze,
    (_T.COMPLETING, KvCame): _complete,
    (_T.READY, Granted): _own,
    (_T.OWNER, Pushed): _resume,
    (_T.OWNER, SourceLost): _leave_owner,
    **_rows((_T.OPENING, _T.HOLDING), (TokensCame, KvCame, FreezeCame), _refuse_early),
    **_rows(_HOLDING, (SourceLost,), _drop),
    **_rows((*_HOLDING, _T.READY), (Aborted, Expired), _drop),
    **_rows((*_HOLDING, _T.READY), (Refused,), _refuse),
    **_rows((*_HOLDING, _T.READY, _T.OWNER), (JobGone,), _let_go),
}
