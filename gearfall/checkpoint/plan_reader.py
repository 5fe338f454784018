"""Carries out a tensor's plan by positioned reads, in memory of a few MiB.

By file descriptor and not by mapping: a file that shrinks meanwhile is a short read and an error,
where a mapping would kill the process.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np

from gearfall.checkpoint.reshard import Piece, TensorPlan
from gearfall.core.errors import CorruptCheckpoint

BLOCK_BYTES = 2**20
"""Most bytes that one read fetches and one call of the sink brings, but for single rows."""

Sink = Callable[[memoryview], object]
"""Takes the next bytes; they are valid during the call only."""


def read_plan(plan: TensorPlan, fds: Sequence[int], sink: Sink) -> None:
    """Bring the bytes of a tensor to `sink` in their order; `fds` are the open partitions.

    Raises CorruptCheckpoint when a file is shorter than the plan says.
    """
    rows = BLOCK_BYTES // max((piece.stride_bytes for piece in plan.pieces), default=1)
    if rows <= 1 or plan.rows == 1:
        for partition, offset_bytes, size_bytes in plan.byte_ranges():
            _stream(fds[partition], offset_bytes, size_bytes, sink)
        return
    buffer = bytearray(BLOCK_BYTES)
    for first in range(0, plan.rows, rows):
        sink(_gather(plan, fds, first, min(rows, plan.rows - first), buffer))


def read_into(fd: int, view: memoryview, offset_bytes: int) -> None:
    """Fill a view from a file. Raises CorruptCheckpoint when the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset_bytes + done)
        if count == 0:
            raise CorruptCheckpoint(
                f"a file ended at byte {offset_bytes + done}: it became shorter while it was read"
            )
        done += count


def _stream(fd: int, offset_bytes: int, size_bytes: int, sink: Sink) -> None:
    buffer = memoryview(bytearray(min(size_bytes, BLOCK_BYTES)))
    for done in range(0, size_bytes, BLOCK_BYTES):
        block = buffer[: min(BLOCK_BYTES, size_bytes - done)]
        read_into(fd, block, offset_bytes + done)
        sink(block)


def _gather(
    plan: TensorPlan, fds: Sequence[int], first: int, rows: int, buffer: bytearray
) -> memoryview:
    """Read whole stretches of rows and pick the columns: few large reads for many small pieces."""
    target = np.empty((rows, plan.row_bytes), dtype=np.uint8)
    column = 0
    for piece in plan.pieces:
        source = _read_rows(piece, fds[piece.partition], first, rows, buffer)
        target[:, column : column + piece.size_bytes] = source
        column += piece.size_bytes
    return target.reshape(-1).data


def _read_rows(
    piece: Piece, fd: int, first: int, rows: int, buffer: bytearray
) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    span_bytes = (rows - 1) * piece.stride_bytes + piece.size_bytes
    view = memoryview(buffer)[:span_bytes]
    read_into(fd, view, piece.offset_bytes + first * piece.stride_bytes)
    strides = (piece.stride_bytes, 1)
    flat = np.frombuffer(view, dtype=np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (rows, piece.size_bytes), strides)
