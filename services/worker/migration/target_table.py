"""A live migration at its target: one pure state machine.

The target holds the job, runs it with its output held back, and owns it once its router says so.

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

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from services.worker.migration.events import (
    Aborted,
    Accept,
    Connected,
    End,
    Expired,
    Feed,
    FreezeCame,
    Granted,
    Held,
    JobGone,
    KvCame,
    Pushed,
    Refused,
    Release,
    SendProgress,
    SendReady,
    SendRefused,
    SendResumed,
    SetTimer,
    SourceLost,
    TargetAct,
    TargetEffect,
    TargetEvent,
    TokensCame,
)
from services.worker.migration.terms import Terms, rows


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
    **rows((_T.OPENING, _T.HOLDING), (TokensCame, KvCame, FreezeCame), _refuse_early),
    **rows(_HOLDING, (SourceLost,), _drop),
    **rows((*_HOLDING, _T.READY), (Aborted, Expired), _drop),
    **rows((*_HOLDING, _T.READY), (Refused,), _refuse),
    **rows((*_HOLDING, _T.READY, _T.OWNER), (JobGone,), _let_go),
}
