"""A line of seconds over bytes that single outliers do not move, small sizes as exact as large.

It minimises sum |line(n) - t| / t over the points (n, t): the mean error as predictions are judged
by. Noise of loads grows with their size, so a fit of plain seconds takes its constant, which is
most of a small load, from the noise of the large ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEAST_S = 1e-3
"""Below that, noise does not shrink with the time."""

Point = tuple[int, float]
"""Bytes, seconds."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = fixed_s + s_per_byte * size."""

    fixed_s: float
    s_per_byte: float

    def at(self, size_bytes: int) -> float:
        """Return the seconds for a size, never below 0."""
        return max(0.0, self.fixed_s + self.s_per_byte * size_bytes)


def line_through(points: Iterable[Point]) -> Line | None:
    """Return the line of least relative error; None unless two sizes differ.

    Neither its slope nor its seconds at size 0 are below 0.
    """
    found = tuple(points)
    if len({size for size, _ in found}) < 2:
        return None
    sizes, seconds = (np.array(each, dtype=np.float64) for each in zip(*found, strict=True))
    weights = 1.0 / np.maximum(seconds, _LEAST_S)
    fixed, slopes = _through_each(sizes, seconds, weights)
    is_allowed = (fixed >= 0) & (slopes >= 0)
    errors = _errors(fixed, slopes, sizes, seconds, weights)
    if not is_allowed[errors.argmin()]:
        # Convex: the best line that is allowed lies where one of the two is 0.
        has_size = sizes > 0
        fixed = np.array([_median(seconds, weights), 0.0])
        rates = seconds[has_size] / sizes[has_size]
        slopes = np.array([0.0, _median(rates, (sizes * weights)[has_size])])
        errors = _errors(fixed, slopes, sizes, seconds, weights)
    best = errors.argmin()
    return Line(float(fixed[best]), float(slopes[best]))


def _through_each(sizes: Floats, seconds: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return the best line through each point as what it is at 0, and its slope.

    The best of all lines goes through two points, so it is one of these.
    """
    ahead = sizes[None, :] - sizes[:, None]
    rises = seconds[None, :] - seconds[:, None]
    slopes = np.divide(rises, ahead, out=np.zeros_like(rises), where=ahead != 0)
    best = _median(slopes, np.abs(ahead) * weights)
    return seconds - best * sizes, best


def _errors(
    fixed: Floats, slopes: Floats, sizes: Floats, seconds: Floats, weights: Floats
) -> Floats:
    found = np.abs(fixed[:, None] + slopes[:, None] * sizes - seconds)
    return np.asarray((found * weights).sum(axis=1))


def _median(values: Floats, weights: Floats) -> Floats:
    """Return the value, of each row, on whose either side at most half of the weight lies."""
    order = values.argsort(axis=-1)
    sums = np.take_along_axis(weights, order, -1).cumsum(axis=-1)
    at = (2 * sums >= sums[..., -1:]).argmax(axis=-1)
    ordered = np.take_along_axis(values, order, -1)
    return np.asarray(np.take_along_axis(ordered, at[..., None], -1)[..., 0])
