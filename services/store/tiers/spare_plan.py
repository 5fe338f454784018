"""How much memory is worth having ready for the load that comes next. Pure."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest

LEAST_BYTES = 16 * 2**20
"""Less is faulted in by a load itself in a few milliseconds."""


def plan_spares(
    models: Iterable[Sequence[int]], room_bytes: int, least_bytes: int = LEAST_BYTES
) -> tuple[int, ...]:
    """Return the sizes of files to have faulted in, largest first, never more than the room.

    `models`: the partition sizes of each model that could be loaded next. The n-th file is as large
    as any model's n-th largest partition; one that finds too little room is cut: a load
    lengthens it and saves what is there. Nothing below `least_bytes`.
    """
    ordered = (sorted(sizes, reverse=True) for sizes in models)
    planned: list[int] = []
    for sizes in zip_longest(*ordered, fillvalue=0):
        size_bytes = min(max(sizes), room_bytes)
        if size_bytes < least_bytes:
            break
        planned.append(size_bytes)
        room_bytes -= size_bytes
    return tuple(planned)


def choose_spare(faulted: Sequence[tuple[int, int]], size_bytes: int) -> int | None:
    """Return which of some (faulted bytes, size) serves a file of `size_bytes` best.

    That with the most of it faulted in, of those the smallest; None where nothing is.
    """
    useful = [
        (-min(there_bytes, size_bytes), held_bytes, index)
        for index, (there_bytes, held_bytes) in enumerate(faulted)
        if there_bytes > 0
    ]
    return min(useful)[2] if useful else None
