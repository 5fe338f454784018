"""Rotary embeddings looked up: a position's cosines and sines are computed once, in fixed blocks.

Computed for the tokens of a step, they would hang on where in the batch a position stands (torch's
vector loop and its tail may differ in the last bit), and cost time in every step.
"""

import torch
from torch import nn

_BLOCK_POSITIONS = 1024
KINDS = frozenset(
    {
        "Gemma2RotaryEmbedding",
        "GemmaRotaryEmbedding",
        "LlamaRotaryEmbedding",
        "MistralRotaryEmbedding",
        "Phi3RotaryEmbedding",
        "Qwen2RotaryEmbedding",
        "Qwen3RotaryEmbedding",
    }
)
"""Classes whose result for a position depends on that position alone."""
LAYERED_KIND = "Gemma3RotaryEmbedding"
"""The same for each of several kinds of layers."""


class RotaryTable(nn.Module):
    """Stands for a rotary embedding of `KINDS`; grows by whole blocks of positions."""

    def __init__(self, inner: nn.Module, layer_type: str = "") -> None:
        super().__init__()
        self.inner = inner
        self._arguments = (layer_type,) if layer_type else ()
        self._cos = self._sin = torch.empty(0, 0)

    def table(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines f32[P, R] of positions below P, at least `positions`."""
        while self._cos.shape[0] < positions:
            self._grow()
        return self._cos, self._sin

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of x's dtype [..., T, R] for int64[..., T]."""
        cos, sin = self.table(int(position_ids.max()) + 1)
        return cos[position_ids].to(x.dtype), sin[position_ids].to(x.dtype)

    def _grow(self) -> None:
        first = self._cos.shape[0]
        device = next(self.inner.buffers()).device
        positions = torch.arange(first, first + _BLOCK_POSITIONS, device=device).unsqueeze(0)
        like = torch.empty(0, dtype=torch.float32, device=device)
        with torch.inference_mode(mode=False):  # plain tensors, whoever asks first
            cos, sin = (each[0] for each in self.inner(like, positions, *self._arguments))
        if first:
            cos, sin = torch.cat((self._cos, cos)), torch.cat((self._sin, sin))
        self._cos, self._sin = cos.contiguous(), sin.contiguous()


class LayeredRotaryTable(nn.Module):
    """Stands for a rotary embedding of `LAYERED_KIND`: a table for each kind of layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._tables: dict[str, RotaryTable] = {}

    def table(self, layer_type: str) -> RotaryTable:
        """Return the table of a kind of layers."""
        if layer_type not in self._tables:
            self._tables[layer_type] = RotaryTable(self.inner, layer_type)
        return self._tables[layer_type]

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of x's dtype [..., T, R] for int64[..., T]."""
        cos, sin = self.table(layer_type)(x, position_ids)
        return cos, sin
