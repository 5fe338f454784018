"""What LoRA adapters add to a module's output: y = W x + scale * B (A x), for rows that ask for it.

Hu et al. 2021 (arXiv 2106.09685), section 4.1, unmerged: rows of several adapters and of none stand
in one batch. A row's update comes from that row alone, by kernels that don't look at other rows, so
it is the same bits in every batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from services.worker.engine.model.ops import Ops


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapter's update of one module."""

    a: torch.Tensor
    """bf16|f16|f32[rank, in]; of an embedding [rank, vocabulary]."""
    b: torch.Tensor
    """bf16|f16|f32[out, rank]"""
    scale: float


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The rows of a step that run with one adapter."""

    adapter: str
    tokens: torch.Tensor
    """int64[n]: of the T packed tokens."""
    logits: torch.Tensor
    """int64[m]: of the R rows whose logits are wanted."""


class LoraStep:
    """The step under way, as every slot of a model sees it."""

    def __init__(self) -> None:
        self.groups: Sequence[RowGroup] = ()


class LoraSlot:
    """The updates that attached adapters have for one module."""

    def __init__(self, ops: Ops, step: LoraStep, *, is_head: bool) -> None:
        """`is_head`: the module computes the wanted logits alone, not all tokens."""
        self._ops = ops
        self._step = step
        self._is_head = is_head
        self.factors: Mapping[str, Factors] = {}

    def add(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Add the updates of the step's rows to `out` f32[T, N], the module's output for `x`."""
        for rows, factors in self._wanted():
            # Rows are distinct and in order: as many as there are, are all there are.
            picked = x if len(rows) == len(x) else x.index_select(0, rows)
            inner = self._ops.linear(picked, factors.a, None)
            self._update(out, rows, inner, factors)

    def add_embedded(self, out: torch.Tensor, ids: torch.Tensor) -> None:
        """Add the updates of an embedding to `out` f32[T, N], its output for `ids` int64[T]."""
        for rows, factors in self._wanted():
            columns = factors.a.index_select(1, ids.index_select(0, rows))
            self._update(out, rows, columns.t().float().contiguous(), factors)

    def _wanted(self) -> Sequence[tuple[torch.Tensor, Factors]]:
        return [
            (rows, self.factors[group.adapter])
            for group in self._step.groups
            if group.adapter in self.factors
            and len(rows := group.logits if self._is_head else group.tokens)
        ]

    def _update(
        self, out: torch.Tensor, rows: torch.Tensor, inner: torch.Tensor, factors: Factors
    ) -> None:
        # Scaled apart: fused into the addition, the last bit would hang on a row's place.
        update = self._ops.linear(inner, factors.b, None).mul_(factors.scale)
        if len(rows) == len(out):
            out.add_(update)
        else:
            out.index_add_(0, rows, update)
