"""Figures over rounds, and the order of contenders in each. Pure."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float


def rotated(targets: Sequence[str], by: int) -> tuple[str, ...]:
    """Return the targets in an order that begins elsewhere each time."""
    start = by % len(targets)
    return (*targets[start:], *targets[:start])


def spread(values: Iterable[float]) -> Spread:
    """Return median and range. Raises ValueError without a value."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no value")
    return Spread(statistics.median(ordered), ordered[0], ordered[-1])
