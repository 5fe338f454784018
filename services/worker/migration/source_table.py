"""A live migration at its source: one pure state machine.

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

Pairs that are not listed change nothing.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from services.worker.migration.events import (
    Accepted,
    AskRouter,
    End,
    Expired,
    Frozen,
    HandedOver,
    JobGone,
    Kept,
    Produced,
    Progress,
    Ready,
    Refused,
    SendBlocks,
    SendFreeze,
    SendTokens,
    SetTimer,
    SourceAct,
    SourceEffect,
    SourceEvent,
    Stored,
    TargetLost,
)
from services.worker.migration.terms import Terms, rows


class SourceState(Enum):
    """How far the source has come."""

    OFFERED = "offered"
    MOVING = "moving"
    FREEZING = "freezing"
    FROZEN = "frozen"
    ASKING = "asking"
    """The router was asked; only its answer counts."""
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
    gap: int = sys.maxsize
    """What the target lacked at the end of the last round."""


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
        if gap >= source.gap:
            wanted = max(wanted, terms.last_gap_tokens)
    source = replace(source, gap=gap)
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
    **rows(_OWNING, (Refused, TargetLost), _lose_target),
    **rows(_OWNING, (Expired,), _expire_source),
    **rows(_OWNING, (JobGone,), _leave),
    **rows(_OWNING, (Produced,), _note_produced),
    **rows((_S.FREEZING, _S.FROZEN), (Stored,), _note_stored),
}
