"""Tensors that the tests of CPU kernels are fed, and how they compare what comes out."""

import torch


def random(seed: int, *shape: int) -> torch.Tensor:
    """Normal float32 numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of float32 tensors: NaN is NaN, and zeros have signs."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
