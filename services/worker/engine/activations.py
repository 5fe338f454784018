"""Activation functions whose result does not hang on the batch that an element stands in."""

import torch
from torch import nn

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


def is_silu(module: object) -> bool:
    """Whether a module, in a RowActivation or not, computes x * sigmoid(x)."""
    inner = module.inner if isinstance(module, RowActivation) else module
    return type(inner).__name__ in {"SiLUActivation", "SiLU"}
