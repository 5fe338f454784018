"""Stand-ins for modules of a transformers model: stored weights in, float32 activations out.

A replaced module computes what the original computes in float32, on weights that keep their stored
dtype and place. Everything that is not replaced gets float32 copies of its (small) parameters.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from services.worker.engine.activations import RowActivation, is_activation, is_silu
from services.worker.engine.lora import LoraSlot
from services.worker.engine.ops import Ops
from services.worker.engine.rotary import KINDS as ROTARY_KINDS
from services.worker.engine.rotary import RotaryTable

_LLAMA_NORMS = frozenset(
    {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"}
)
"""Classes that compute weight * x / sqrt(mean(x^2) + eps)."""
_GATED_MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})
"""Classes that compute down(act(gate(x)) * up(x))."""


class StoredLinear(nn.Module):
    """A linear layer over a weight [N, K] in its stored dtype."""

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
        hidden = self._ops.silu_mul(self.gate_proj(rows), self.up_proj(rows))
        out: torch.Tensor = self.down_proj(hidden).view(x.shape)
        return out


def replace_modules(model: nn.Module, ops: Ops) -> None:
    """Replace what can be replaced below `model`, in place, and widen every other parameter."""
    for name, child in tuple(model.named_children()):
        replace_modules(child, ops)
        stand_in = _stand_in(child, ops)
        if stand_in is not child:
            setattr(model, name, stand_in)
    _widen_parameters(model)


def _stand_in(module: nn.Module, ops: Ops) -> nn.Module:
    """Return the module that takes this one's place, itself where it stays."""
    kind = type(module).__name__
    if type(module) is nn.Linear:
        return StoredLinear(ops, module.weight, module.bias)
    if type(module) is Conv1D:
        return StoredLinear(ops, module.weight.t().contiguous(), module.bias)
    if type(module) is nn.Embedding:
        return StoredEmbedding(module.weight)
    if kind in _LLAMA_NORMS:
        return RmsNorm(ops, module.weight, float(module.variance_epsilon))  # type: ignore[arg-type]
    if kind in _GATED_MLPS and is_silu(module.act_fn):
        return GatedMlp(ops, module.gate_proj, module.up_proj, module.down_proj)  # type: ignore[arg-type]
    return _apart_from_the_batch(module)


def _apart_from_the_batch(module: nn.Module) -> nn.Module:
    """Return a module whose result does not hang on where in the batch an element stands."""
    if type(module).__name__ in ROTARY_KINDS:
        return RotaryTable(module)
    return RowActivation(module) if is_activation(module) else module


def _widen_parameters(module: nn.Module) -> None:
    """Give a module that stays float32 parameters; what will be replaced above keeps its own."""
    if type(module) in {nn.Linear, Conv1D, nn.Embedding, StoredLinear, StoredEmbedding}:
        return
    for name, parameter in tuple(module._parameters.items()):  # noqa: SLF001 (named ones are slow)
        if parameter is None or not parameter.is_floating_point():
            continue
        if parameter.dtype != torch.float32:
            setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
