"""Stand-ins for modules of a transformers model: stored weights in, float32 activations out.

A replaced module computes what the original computes in float32, on weights that keep their stored
dtype and place. Everything that is not replaced gets float32 copies of its (small) parameters.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gearfall.infra.kernels.cpu_kernels import Activation
from services.worker.engine.model.activations import is_activation, is_silu, stand_in_for
from services.worker.engine.model.lora import LoraSlot
from services.worker.engine.model.ops import Ops
from services.worker.engine.model.rotary import KINDS as ROTARY_KINDS
from services.worker.engine.model.rotary import LAYERED_KIND, LayeredRotaryTable, RotaryTable

_LLAMA_NORMS = frozenset(
    {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"}
)
"""Classes that compute weight * x / sqrt(mean(x^2) + eps)."""
_SHIFTED_NORMS = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"})
"""Classes that compute (1 + weight) * x / sqrt(mean(x^2) + eps)."""
_SCALED_EMBEDDINGS = frozenset(
    {f"{family}TextScaledWordEmbedding" for family in ("Gemma", "Gemma2", "Gemma3")}
)
"""Classes of embeddings that multiply a row by `embed_scale`."""
_GATED_MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})
"""Classes that compute down(act(gate(x)) * up(x))."""


class StoredLinear(nn.Module):
    """A linear layer over a weight [N, K] in its stored dtype, rows or columns side by side."""

    def __init__(self, ops: Ops, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._ops = ops
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.slot: LoraSlot | None = None
        """What adapters add here; whoever computes this layer's output itself must call it."""

    @property
    def sizes(self) -> tuple[int, int]:
        """Lengths of the input and of the output."""
        return self.weight.shape[1], self.weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[..., N] for f32[..., K]."""
        x_rows = x.reshape(-1, x.shape[-1])
        rows = self._ops.linear(x_rows, self.weight, self.bias)
        if self.slot is not None:
            self.slot.add(rows, x_rows)
        return rows.view(*x.shape[:-1], rows.shape[-1])


class StoredEmbedding(nn.Module):
    """An embedding over a table [V, K] in its stored dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.slot: LoraSlot | None = None
        """What adapters add here."""

    @property
    def sizes(self) -> tuple[int, int]:
        """Size of the vocabulary and length of the output."""
        return self.weight.shape[0], self.weight.shape[1]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return f32[..., K] for int64[...]."""
        out = nn.functional.embedding(ids, self.weight).float()
        if self.slot is not None:
            self.slot.add_embedded(out.view(-1, out.shape[-1]), ids.reshape(-1))
        return out


class ScaledEmbedding(nn.Module):
    """An embedding over a table [V, K] in its stored dtype, its rows times `scale`.

    It takes no adapters: whether their part is to be scaled too is not settled.
    """

    def __init__(self, weight: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return f32[..., K] for int64[...]."""
        return nn.functional.embedding(ids, self.weight).float() * self.scale


class RmsNorm(nn.Module):
    """Root mean square norm with a float32 weight [K]."""

    def __init__(self, ops: Ops, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self._ops = ops
        self.eps = eps
        self.weight = nn.Parameter(weight.float(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[..., K] for f32[..., K]."""
        return self._ops.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


class LayerNorm(nn.Module):
    """Layer norm with float32 weight and bias [K]."""

    def __init__(self, ops: Ops, inner: nn.LayerNorm) -> None:
        super().__init__()
        self._ops = ops
        self.eps = inner.eps
        self.weight = nn.Parameter(inner.weight.float(), requires_grad=False)
        self.bias = nn.Parameter(inner.bias.float(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[..., K] for f32[..., K]."""
        rows = x.reshape(-1, x.shape[-1])
        return self._ops.layer_norm(rows, self.weight, self.bias, self.eps).view(x.shape)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, ops: Ops, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self._ops = ops
        self.gate_proj = gate
        self.up_proj = up
        self.down_proj = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[..., K] for f32[..., K]."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = self._ops.activate(Activation.SILU, self.gate_proj(rows), self.up_proj(rows))
        out: torch.Tensor = self.down_proj(hidden).view(x.shape)
        return out


_KEPT = (nn.Linear, Conv1D, nn.Embedding, StoredLinear, StoredEmbedding, ScaledEmbedding)
"""Classes whose parameters keep their stored dtype."""


def replace_modules(model: nn.Module, ops: Ops) -> None:
    """Replace what can be replaced below `model`, in place, and widen every other parameter."""
    for name, child in tuple(model.named_children()):
        replace_modules(child, ops)
        stand_in = _stand_in(child, ops)
        if stand_in is not child:
            setattr(model, name, stand_in)
    _widen_parameters(model)


def _stand_in(module: Any, ops: Ops) -> nn.Module:
    """Return the module that takes this one's place, itself where it stays."""
    if type(module).__name__ in _GATED_MLPS and is_silu(module.act_fn):
        return GatedMlp(ops, module.gate_proj, module.up_proj, module.down_proj)
    for find in (_stored, _norm, _apart_from_the_batch):
        found = find(module, ops)
        if found is not None:
            return found
    stays: nn.Module = module
    return stays


def _stored(module: Any, ops: Ops) -> nn.Module | None:
    """Return a module over the stored weight of this one, if it is a product or an embedding."""
    if type(module) is nn.Linear:
        return StoredLinear(ops, module.weight, module.bias)
    if type(module) is Conv1D:
        return StoredLinear(ops, module.weight.t(), module.bias)
    if type(module) is nn.Embedding:
        return StoredEmbedding(module.weight)
    if type(module).__name__ in _SCALED_EMBEDDINGS:
        return ScaledEmbedding(module.weight, float(module.embed_scale))
    return None


def _norm(module: Any, ops: Ops) -> nn.Module | None:
    kind = type(module).__name__
    if kind in _LLAMA_NORMS:
        return RmsNorm(ops, module.weight, float(module.variance_epsilon))
    if kind in _SHIFTED_NORMS:
        return RmsNorm(ops, 1.0 + module.weight.float(), float(module.eps))
    is_plain = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    if is_plain and module.weight is not None and module.bias is not None:
        return LayerNorm(ops, module)
    return None


def _apart_from_the_batch(module: nn.Module, ops: Ops) -> nn.Module | None:
    """Return a module whose result does not hang on where in the batch an element stands."""
    if type(module).__name__ in ROTARY_KINDS:
        return RotaryTable(module)
    if type(module).__name__ == LAYERED_KIND:
        return LayeredRotaryTable(module)
    return stand_in_for(module, ops) if is_activation(module) else None


def _widen_parameters(module: nn.Module) -> None:
    """Give a module that stays float32 parameters; what will be replaced above keeps its own."""
    if type(module) in _KEPT:
        return
    if type(module).__name__ in _SCALED_EMBEDDINGS:
        return
    for name, parameter in tuple(module._parameters.items()):  # noqa: SLF001 (named ones are slow)
        if parameter is None or not parameter.is_floating_point():
            continue
        if parameter.dtype != torch.float32:
            setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
