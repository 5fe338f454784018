"""What the two workers of a migration hear and do, as values; the tables say which follows what.

Indices count generated tokens; KV counts tokens from the prompt's first on.
"""

from dataclasses import dataclass
from enum import Enum

# Events of the source.


@dataclass(frozen=True, slots=True)
class Accepted:
    """The target holds the job; it has keys and values of `kv_tokens` tokens."""

    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """The target, or its engine, can't go on."""

    reason: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The target has computed, or got, all before these."""

    next_index: int
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Produced:
    """The source's engine brought tokens, and they were pushed."""

    next_index: int


@dataclass(frozen=True, slots=True)
class Stored:
    """Keys and values of so many tokens are in the pinned job's blocks."""

    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Frozen:
    """The source's engine has stopped the job before `next_index`."""

    next_index: int
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The target needs nothing more."""

    next_index: int


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The router made the target the owner."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The router did not."""

    reason: str


@dataclass(frozen=True, slots=True)
class TargetLost:
    """The call to the target broke."""

    reason: str


# Events of the target.


@dataclass(frozen=True, slots=True)
class Connected:
    """The push stream to the job's router is open."""


@dataclass(frozen=True, slots=True)
class Held:
    """The engine holds the job with these tokens, so many of them computed."""

    next_index: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class TokensCame:
    """A round: tokens [start, end), and by KV how many tokens' keys and values belong to it."""

    start: int
    end: int
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KvCame:
    """Keys and values of so many tokens, from the first on, lie in the blocks."""

    kv_tokens: int


@dataclass(frozen=True, slots=True)
class FreezeCame:
    """The source stopped before `next_index`."""

    next_index: int
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Granted:
    """The router made this worker the owner."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """The job's first token from here is on its way to the router."""

    next_index: int


@dataclass(frozen=True, slots=True)
class SourceLost:
    """The source's call broke: it may have asked the router before."""

    reason: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """The source says that it goes on as the owner, or that the job is over."""

    reason: str


# Events of both.


@dataclass(frozen=True, slots=True)
class JobGone:
    """The job left this worker: ended, cancelled, lost. `is_certain`: its router said so."""

    reason: str
    is_certain: bool = True


@dataclass(frozen=True, slots=True)
class Expired:
    """The timer ran out."""


SourceEvent = (
    Accepted
    | Refused
    | Progress
    | Produced
    | Stored
    | Frozen
    | Ready
    | HandedOver
    | Kept
    | TargetLost
    | JobGone
    | Expired
)
TargetEvent = (
    Connected
    | Held
    | TokensCame
    | KvCame
    | FreezeCame
    | Granted
    | Pushed
    | SourceLost
    | Aborted
    | Refused
    | JobGone
    | Expired
)

# Effects.


@dataclass(frozen=True, slots=True)
class SendTokens:
    """To the target: tokens [start, end) as a round."""

    round: int
    start: int
    end: int
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """To the target's cache: keys and values of tokens [start, end)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SendFreeze:
    """To the target: the source stopped here."""

    next_index: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class AskRouter:
    """To the router, behind every token: make the target the owner."""

    next_index: int


class SourceAct(Enum):
    """What the source does without further facts."""

    PIN = "pin"
    FREEZE = "freeze"
    THAW = "thaw"
    UNPIN = "unpin"
    COMMIT = "commit"
    ABORT = "abort"
    """Tell the target that the job stays, or is over."""


@dataclass(frozen=True, slots=True)
class Feed:
    """To the engine: tokens [start, end), and how many tokens' keys and values are there."""

    start: int
    end: int
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Accept:
    """To the source: held; keys and values of so many tokens are there."""

    kv_tokens: int


@dataclass(frozen=True, slots=True)
class SendProgress:
    """To the source: the round is whole."""

    round: int
    next_index: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Release:
    """To the engine: run it; the board holds back what comes, from this index on."""

    next_index: int


@dataclass(frozen=True, slots=True)
class SendReady:
    """To the source."""

    next_index: int


@dataclass(frozen=True, slots=True)
class SendRefused:
    """To the source."""

    reason: str


@dataclass(frozen=True, slots=True)
class SendResumed:
    """To the source: granted, and a token of its own was pushed."""

    next_index: int


class TargetAct(Enum):
    """What the target does without further facts."""

    HOLD = "hold"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Expire after so many seconds, in place of any earlier timer; 0: never."""

    seconds: float


@dataclass(frozen=True, slots=True)
class End:
    """It is over; `error` is empty when the job moved."""

    error: str = ""


SourceEffect = SendTokens | SendBlocks | SendFreeze | AskRouter | SourceAct | SetTimer | End
TargetEffect = (
    Feed
    | Accept
    | SendProgress
    | Release
    | SendReady
    | SendRefused
    | SendResumed
    | TargetAct
    | SetTimer
    | End
)
