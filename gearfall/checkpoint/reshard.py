"""What a rank of any number of ranks has to read of a checkpoint, wherever its parts lie. Pure.

A tensor cut along dimension d is, in row-major order, prod(shape[:d]) rows; a part holds a stretch
of each row. So every rank's tensor is a number of equal rows, and every row the same pieces of
partitions one behind the other, each a fixed stride further in the next row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gearfall.core.checkpoint.dtypes import DTYPE_BYTES
from gearfall.core.checkpoint.manifest import MAX_PARTITIONS, Manifest, TensorEntry
from gearfall.core.checkpoint.manifest_split import Ranges
from gearfall.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Part:
    """Where elements of a dimension lie in a file: a whole tensor, or a rank's part of it."""

    partition: int
    offset_bytes: int
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one stretch of each row."""

    partition: int
    offset_bytes: int
    """Of the first row's stretch, from the partition's start."""
    size_bytes: int
    """Of one row's stretch."""
    stride_bytes: int
    """From one row's stretch to the next row's."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One rank's tensor as `rows` rows, each made of `pieces` in their order."""

    dtype: str
    shape: tuple[int, ...]
    rows: int
    pieces: tuple[Piece, ...]
    """Empty for a tensor without elements."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the result."""
        return sum(piece.size_bytes for piece in self.pieces)

    @property
    def size_bytes(self) -> int:
        """Bytes of the result."""
        return self.rows * self.row_bytes

    @property
    def is_view(self) -> bool:
        """Whether the tensor lies in one stretch of one partition, so that no byte is copied."""
        return self.rows <= 1 and len(self.pieces) <= 1

    def byte_ranges(self) -> Iterator[tuple[int, int, int]]:
        """Yield (partition, offset, size) of the bytes of the result in their order."""
        for row in range(self.rows):
            for piece in self.pieces:
                yield (
                    piece.partition,
                    piece.offset_bytes + row * piece.stride_bytes,
                    (piece.size_bytes),
                )


def plan_rank(manifest: Manifest, rank: int, ranks: int) -> dict[str, TensorPlan]:
    """Plan every tensor of rank `rank` of `ranks`, aliases included (equal plans, same bytes).

    Works for any number of ranks, whatever number the checkpoint was written for. Raises
    InvalidRequest when a tensor can't be shared by so many.
    """
    if not 0 <= rank < ranks <= MAX_PARTITIONS:
        raise InvalidRequest(f"there is no rank {rank} of {ranks}", param="ranks")
    return {
        name: _plan_tensor(entries, manifest.ranks, rank, ranks)
        for name, entries in manifest.entries_by_name().items()
    }


def plan_slice(
    dtype: str, full_shape: tuple[int, ...], dimension: int, parts: Sequence[Part], wanted: Ranges
) -> TensorPlan:
    """Plan the elements `wanted` of a dimension out of the parts that hold them.

    `parts` together hold every wanted element; of several that do, the one that goes on longest
    is read, the first of equals.
    """
    inner_bytes = math.prod(full_shape[dimension + 1 :]) * DTYPE_BYTES[dtype]
    length = sum(stop - start for start, stop in wanted)
    shape = (*full_shape[:dimension], length, *full_shape[dimension + 1 :])
    rows = math.prod(full_shape[:dimension])
    if not rows * inner_bytes * length:
        return TensorPlan(dtype, shape, 0, ())
    pieces: list[Piece] = []
    for start, stop in wanted:
        done = start
        while done < stop:
            piece, count = _longest_piece(parts, done, stop, inner_bytes)
            _append(pieces, piece)
            done += count
    return _flatten(TensorPlan(dtype, shape, rows, tuple(pieces)))


def _plan_tensor(
    entries: Sequence[TensorEntry], saved_ranks: int, rank: int, ranks: int
) -> TensorPlan:
    # A rank's own partition first: it is the one that lies nearest to its accelerator.
    own = rank * saved_ranks // ranks
    nearest = sorted(entries, key=lambda entry: (entry.partition != own, entry.partition))
    entry = nearest[0]
    if entry.split is None or saved_ranks == ranks == 1:
        piece = Piece(entry.partition, entry.offset_bytes, entry.size_bytes, entry.size_bytes)
        return TensorPlan(
            entry.dtype, entry.shape, bool(entry.size_bytes), (piece,) * bool(entry.size_bytes)
        )
    parts = [
        Part(e.partition, e.offset_bytes, entry.split.ranges(e.partition, saved_ranks))
        for e in nearest
    ]
    wanted = entry.split.ranges(rank, ranks)
    return plan_slice(entry.dtype, entry.full_shape, entry.split.dimension, parts, wanted)


def _longest_piece(
    parts: Sequence[Part], start: int, stop: int, inner_bytes: int
) -> tuple[Piece, int]:
    """Return the piece that covers most elements from `start` on, and how many."""
    best: tuple[Piece, int] | None = None
    for part in parts:
        place = 0
        for begin, end in part.ranges:
            count = min(end, stop) - start
            if begin <= start < end and (best is None or count > best[1]):
                offset_bytes = part.offset_bytes + (place + start - begin) * inner_bytes
                row_elements = sum(b - a for a, b in part.ranges)
                piece = Piece(
                    part.partition, offset_bytes, count * inner_bytes, row_elements * inner_bytes
                )
                best = piece, count
            place += end - begin
    assert best is not None, "a checked manifest holds every element"
    return best


def _append(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece; one that goes on where the last one ended makes that one longer."""
    if pieces:
        last = pieces[-1]
        is_next = (
            last.partition == piece.partition
            and last.offset_bytes + last.size_bytes == piece.offset_bytes
        )
        if is_next and last.stride_bytes == piece.stride_bytes:
            size_bytes = pieces.pop().size_bytes + piece.size_bytes
            piece = Piece(piece.partition, last.offset_bytes, size_bytes, piece.stride_bytes)
    pieces.append(piece)


def _flatten(plan: TensorPlan) -> TensorPlan:
    """Make one row of rows that lie one behind the other."""
    if len(plan.pieces) != 1 or plan.pieces[0].size_bytes != plan.pieces[0].stride_bytes:
        return plan
    piece = plan.pieces[0]
    size_bytes = plan.rows * piece.size_bytes
    whole = Piece(piece.partition, piece.offset_bytes, size_bytes, size_bytes)
    return TensorPlan(plan.dtype, plan.shape, 1, (whole,))
