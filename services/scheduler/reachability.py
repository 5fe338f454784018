"""Whether a worker can be reached, judged by one kept connection to it.

    state      event    next
    doubtful   serves   up
    doubtful   broke    down
    up         broke    doubtful    a connection may break once and be made again at once
    down       serves   proving
    proving    broke    down
    proving    steady   up          it has served for a while: no flapping

A new worker is doubtful. Every pair that is not listed changes nothing. Doubt does not count
against a worker: only `down` and `proving` do.
"""

from collections.abc import Iterable, Mapping
from enum import Enum

from gearfall.core.ids import WorkerId

LEASE_GRACE_S = 10.0
"""How long a worker that left cluster state may take to register again: two of its leases."""


class LinkState(Enum):
    """What is known about the connection to one worker."""

    DOUBTFUL = "doubtful"
    UP = "up"
    DOWN = "down"
    PROVING = "proving"


class LinkEvent(Enum):
    """What happens to the connection."""

    SERVES = "serves"
    """It was made, and the worker says that it serves."""
    BROKE = "broke"
    """It ended or could not be made in time."""
    STEADY = "steady"
    """It held for a while since it was made."""


_S, _E = LinkState, LinkEvent

TRANSITIONS: Mapping[tuple[LinkState, LinkEvent], LinkState] = {
    (_S.DOUBTFUL, _E.SERVES): _S.UP,
    (_S.DOUBTFUL, _E.BROKE): _S.DOWN,
    (_S.UP, _E.BROKE): _S.DOUBTFUL,
    (_S.DOWN, _E.SERVES): _S.PROVING,
    (_S.PROVING, _E.BROKE): _S.DOWN,
    (_S.PROVING, _E.STEADY): _S.UP,
}

REACHABLE = frozenset({LinkState.DOUBTFUL, LinkState.UP})


def next_state(state: LinkState, event: LinkEvent) -> LinkState:
    """Return the state after `event`."""
    return TRANSITIONS.get((state, event), state)


def note_absent(
    since_unix_s: Mapping[WorkerId, float], absent: Iterable[WorkerId], now_unix_s: float
) -> dict[WorkerId, float]:
    """Return since when each of `absent` has been away; those that came back are forgotten."""
    return {worker_id: since_unix_s.get(worker_id, now_unix_s) for worker_id in absent}
