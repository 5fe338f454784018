"""A rank's tensors over mapped partitions: views where they lie whole, gathered where not."""

from collections.abc import Sequence
from mmap import mmap

import torch

from gearfall.checkpoint.reshard import TensorPlan, plan_rank
from gearfall.core.errors import InvalidRequest
from gearfall.core.manifest import Manifest

Memory = mmap | bytearray | memoryview


def rank_tensors(
    manifest: Manifest, partitions: Sequence[Memory], rank: int, ranks: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of rank `rank` of `ranks` by name, aliases over the same bytes.

    Views keep their partition's memory alive and must not be written. Raises InvalidRequest for a
    rank that can't be had or a dtype that this torch lacks.
    """
    opened: dict[TensorPlan, torch.Tensor] = {}
    plans = plan_rank(manifest, rank, ranks)
    return {name: _open_once(plan, partitions, opened) for name, plan in plans.items()}


def open_tensor(plan: TensorPlan, partitions: Sequence[Memory]) -> torch.Tensor:
    """Return the tensor of one plan: a view where it is one, else a gathered copy."""
    dtype = _torch_dtype(plan.dtype)
    if not plan.size_bytes:
        return torch.empty(plan.shape, dtype=dtype)
    if plan.is_view:
        piece = plan.pieces[0]
        memory = partitions[piece.partition]
        count = plan.size_bytes // dtype.itemsize
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=piece.offset_bytes)
        return flat.view(plan.shape)
    gathered = torch.empty((plan.rows, plan.row_bytes), dtype=torch.uint8)
    column = 0
    for piece in plan.pieces:
        memory = partitions[piece.partition]
        # as_strided may not run past the end: the last row's stretch ends the span.
        span_bytes = (plan.rows - 1) * piece.stride_bytes + piece.size_bytes
        flat = torch.frombuffer(
            memory, dtype=torch.uint8, count=span_bytes, offset=piece.offset_bytes
        )
        rows = flat.as_strided((plan.rows, piece.size_bytes), (piece.stride_bytes, 1))
        gathered[:, column : column + piece.size_bytes] = rows
        column += piece.size_bytes
    return gathered.view(-1).view(dtype).view(plan.shape)


def _open_once(
    plan: TensorPlan, partitions: Sequence[Memory], opened: dict[TensorPlan, torch.Tensor]
) -> torch.Tensor:
    if plan not in opened:
        opened[plan] = open_tensor(plan, partitions)
    return opened[plan]


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidRequest(f"this torch has no dtype {name}")
    return dtype
