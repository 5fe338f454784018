"""Activation functions whose result does not hang on the batch that an element stands in."""

import torch
from torch import nn

from gearfall.infra.kernels.cpu_kernels import Activation
from services.worker.engine.model.ops import Ops

_LANES = 64
"""More than any CPU's vector loop takes at once, in float32 elements."""


class RowActivation(nn.Module):
    """An elementwise function over whole vectors only.

    torch computes the body of a tensor with vector instructions and the tail without, and the two
    may differ in the last bit (silu, gelu and tanh do). Rows of a multiple of the vector's length
    have no tail; other rows are padded to one.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[..., K] for f32[..., K]."""
        missing = -x.shape[-1] % _LANES
        if not missing:
            out: torch.Tensor = self.inner(x)
            return out
        padded: torch.Tensor = self.inner(nn.functional.pad(x, (0, missing)))
        return padded[..., : x.shape[-1]]


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an elementwise function of transformers' or torch's own table."""
    return type(module).__module__ in {"transformers.activations", "torch.nn.modules.activation"}


_KINDS = {
    "SiLU": Activation.SILU,
    "SiLUActivation": Activation.SILU,
    "GELUTanh": Activation.GELU_TANH,
    "NewGELUActivation": Activation.GELU_TANH,
    "PytorchGELUTanh": Activation.GELU_TANH,
    "ReLU": Activation.RELU,
}
"""Classes, of those that `is_activation` knows, by the function that the kernels have for them."""


class KernelActivation(nn.Module):
    """One of the kernels' functions."""

    def __init__(self, ops: Ops, kind: Activation) -> None:
        super().__init__()
        self._ops = ops
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[..., K] for f32[..., K]."""
        return self._ops.activate(self.kind, x.reshape(-1, x.shape[-1])).view(x.shape)


def stand_in_for(module: nn.Module, ops: Ops) -> nn.Module:
    """Return what takes the place of an activation."""
    kind = _KINDS.get(type(module).__name__)
    return RowActivation(module) if kind is None else KernelActivation(ops, kind)


def is_silu(module: object) -> bool:
    """Whether a stand-in computes x * sigmoid(x)."""
    return isinstance(module, KernelActivation) and module.kind is Activation.SILU
