"""What sampling asks of rows of logits, by gearfall's CPU kernels, over numpy arrays.

Every row's answer is a function of that row alone, bit for bit, on every instruction set.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearfall import _cuda_ext

_F32, _I32 = 0, 3


@dataclass(frozen=True, slots=True)
class LogitSummaries:
    """R rows; the numbers of a row whose `best` is -1 are ones."""

    best: NDArray[np.int32]
    """[R]: first token with the largest logit; -1 where a logit is NaN or plus infinity, or all are
    minus infinity."""
    largest: NDArray[np.float32]
    """[R]"""
    second: NDArray[np.float32]
    """[R]: largest logit of the other tokens, minus infinity if there is none."""
    total: NDArray[np.float32]
    """[R]: sum of exp(logit - largest)."""
    sharpened_total: NDArray[np.float32]
    """[R]: sum of exp((logit - largest) * sharpness)."""


def summarize(
    logits: NDArray[np.float32],
    sharpness: NDArray[np.float32],
    *,
    threads: int = 1,
    variant: str = "",
) -> LogitSummaries:
    """Summarize `logits` [R, V], whose rows are contiguous; `sharpness` [R]: 1 / temperature.

    `threads` and `variant` as in `cpu_kernels`. Raises ValueError for other shapes.
    """
    best = np.empty(logits.shape[0], dtype=np.int32)
    numbers = np.ones((logits.shape[0], 4), dtype=np.float32)
    if len(best):  # numpy's strides mean nothing without rows
        _cuda_ext.cpu_summarize_logits(
            _view(logits, _F32),
            _view(sharpness, _F32),
            _view(best, _I32),
            _view(numbers, _F32),
            threads,
            variant,
        )
    return LogitSummaries(best, *numbers.T)


def _view(
    array: NDArray[np.float32] | NDArray[np.int32], code: int
) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Return (address, dtype code, shape, strides in elements) for the binding, which checks it."""
    wanted = np.float32 if code == _F32 else np.int32
    if array.dtype != wanted:
        raise ValueError(f"an array of {array.dtype} came, {np.dtype(wanted)} is wanted")
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return array.ctypes.data, code, array.shape, strides
