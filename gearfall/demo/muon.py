"""Muon: momentum whose update is made orthogonal, for the hidden matrices of a small model.

Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024), with its
quintic Newton-Schulz iteration and its coefficients. Matrices of one shape are stepped as one
stack, because a small model has many little matrices and each call costs more than its arithmetic.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(stack: Tensor, *, iterations: int = 5) -> Tensor:
    """Push every singular value of each matrix towards 1; shape (n, rows, columns), kept."""
    a, b, c = _COEFFICIENTS
    tall = stack.size(1) > stack.size(2)
    x = stack.transpose(1, 2) if tall else stack
    norms: Tensor = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / (norms + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon:
    """Steps a set of matrices; the caller sets `lr` and clears the gradients."""

    def __init__(
        self, matrices: Iterable[Tensor], *, lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        """Group `matrices` (each of two dimensions) by shape; `decay` is decoupled."""
        groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            groups[matrix.shape].append(matrix)
        self.lr = lr
        self._momentum = momentum
        self._decay = decay
        self._groups = [
            (group, torch.zeros(len(group), *shape, device=group[0].device))
            for shape, group in groups.items()
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Apply one update to every matrix from its current gradient."""
        for group, velocity in self._groups:
            gradients = torch.stack([_gradient(matrix) for matrix in group])
            velocity.lerp_(gradients, 1 - self._momentum)
            updates = orthogonalise(gradients.lerp(velocity, self._momentum))
            rows, columns = group[0].shape
            scale = max(1.0, rows / columns) ** 0.5
            for matrix, update in zip(group, updates, strict=True):
                matrix.mul_(1 - self.lr * self._decay).sub_(update, alpha=self.lr * scale)


def _gradient(matrix: Tensor) -> Tensor:
    if matrix.grad is None:
        raise ValueError("a matrix has no gradient: run backward first")
    return matrix.grad
