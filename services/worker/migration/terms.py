"""The limits of a migration, and how both its tables are written down. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

_State = TypeVar("_State")
_Step = TypeVar("_Step")


@dataclass(frozen=True, slots=True)
class Terms:
    """Limits of a migration."""

    freeze_gap_tokens: int = 1
    """By tokens: the source freezes when the target lacks at most so many.

    These, and what the source produces until it has stopped, the target computes in a step of its
    others: the fewer the better, and rounds are cheap.
    """
    last_gap_tokens: int = 4
    """By tokens: and at most so many when a round did not make them fewer."""
    freeze_gap_kv_tokens: int = 64
    """By KV: the source freezes when at most so many tokens' keys and values are not there."""
    most_rounds: int = 32
    worst_gap_tokens: int = 64
    """When the rounds are used up: freeze with at most this gap, else give up."""
    move_limit_s: float = 60.0
    """From the offer to the freeze."""
    freeze_limit_s: float = 2.0
    """From the freeze to the target's `ready`."""
    kv_bytes_per_s: float = 0.0
    """Keys and values leave no faster, each job's by itself; 0: as fast as they can."""
    ready_limit_s: float = 10.0
    """How long a target waits for the router's word."""


def rows(
    states: Iterable[_State], events: Iterable[type], rule: Callable[..., _Step]
) -> dict[tuple[_State, type], Callable[..., _Step]]:
    """Return one rule for each of these events in each of these states."""
    return {(state, event): rule for state in states for event in events}
