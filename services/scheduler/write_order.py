"""Which of a plan's writes may go out together, so that a plan of many takes few round trips.

Steps keep their order where it matters to a leader that takes over between two of them: a move is
written down before its first assignment and forgotten behind its last. Wishes for bytes ahead of
use come behind all other steps, which somebody may wait for; reasons, for which nobody does, last.
"""

from collections.abc import Iterator, Sequence

from gearfall.scheduling.actions import (
    Action,
    Assign,
    BeginMove,
    Decide,
    EndMove,
    Unassign,
    Undecide,
    Unwish,
    Wish,
)

MOST_AT_ONCE = 32
_WISHES = (Wish, Unwish)
_REASONS = (Decide, Undecide)


def in_batches(actions: Sequence[Action]) -> Iterator[tuple[Action, ...]]:
    """Yield the writes of a plan, batch by batch: within one the order does not matter.

    A batch holds one sort of step, and each key once.
    """
    steps, reasons = parted(actions)
    wishes = [step for step in steps if isinstance(step, _WISHES)]
    others = [step for step in steps if not isinstance(step, _WISHES)]
    batch: dict[tuple[str, ...], Action] = {}
    for action in (*others, *wishes, *reasons):
        key = key_ids(action)
        is_other = batch and type(action) is not type(next(iter(batch.values())))
        if is_other or key in batch or len(batch) == MOST_AT_ONCE:
            yield tuple(batch.values())
            batch = {}
        batch[key] = action
    if batch:
        yield tuple(batch.values())


def parted(actions: Sequence[Action]) -> tuple[tuple[Action, ...], tuple[Action, ...]]:
    """Return the steps of a plan and its reasons, each in their order."""
    steps = tuple(action for action in actions if not isinstance(action, _REASONS))
    return steps, tuple(action for action in actions if isinstance(action, _REASONS))


def key_ids(action: Action) -> tuple[str, ...]:
    """Return the ids of the record that an action writes or deletes."""
    match action:
        case Assign(record):
            return (record.worker_id, record.model)
        case BeginMove(move):
            return (move.worker_id, move.model)
        case Wish(prefetch):
            return (prefetch.node_id, prefetch.model)
        case Decide(decision):
            return (decision.model,)
        case Undecide(model):
            return (model,)
        case Unassign(key) | EndMove(key) | Unwish(key):
            return key
