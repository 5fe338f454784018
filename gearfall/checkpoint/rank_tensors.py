"""A rank's tensors over mapped partitions: views where they lie whole, gathered where not."""

from collections.abc import Sequence
from mmap import mmap

import torch

from gearfall.checkpoint.reshard import TensorPlan, plan_rank
from gearfall.core.checkpoint.manifest import Manifest
from gearfall.core.errors import InvalidRequest

Memory = mmap | bytearray | memoryview | torch.Tensor
"""A partition's bytes: in host memory, or a tensor of uint8 on any device."""


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
        flat = _bytes_of(partitions[piece.partition], piece.offset_bytes, plan.size_bytes)
        return flat.view(dtype).view(plan.shape)
    parts = []
    for piece in plan.pieces:
        # as_strided may not run past the end: the last row's stretch ends the span.
        span_bytes = (plan.rows - 1) * piece.stride_bytes + piece.size_bytes
        flat = _bytes_of(partitions[piece.partition], piece.offset_bytes, span_bytes)
        parts.append(
            flat.as_strided(
                (plan.rows, piece.size_bytes), (piece.stride_bytes, 1), flat.storage_offset()
            )
        )
    return torch.cat(parts, dim=1).view(-1).view(dtype).view(plan.shape)


def _bytes_of(memory: Memory, offset_bytes: int, size_bytes: int) -> torch.Tensor:
    if isinstance(memory, torch.Tensor):
        return memory[offset_bytes : offset_bytes + size_bytes]
    return torch.frombuffer(memory, dtype=torch.uint8, count=size_bytes, offset=offset_bytes)


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
