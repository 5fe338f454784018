"""The arithmetic of a step that is not transformers' own: linear layers, paged attention, norms.

Two implementations of one port. `NativeOps` is the CPU's: gearfall's kernels, batch-invariant to
the bit. `TorchOps` is plain torch for other devices; there a result may differ in its last bits
with the batch it was computed in.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.infra.kernels.cpu_kernels import Activation


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where the T packed tokens of one step belong; tokens of a sequence stand side by side."""

    block_tables: torch.Tensor
    """int32[S, max_blocks]: blocks of each sequence in this step."""
    seq_index: torch.Tensor
    """int32[T]: row of `block_tables` that a token belongs to."""
    positions: torch.Tensor
    """int32[T]: place of the token in its sequence."""

    def to(self, device: torch.device) -> "StepLayout":
        """Return it on `device`."""
        return StepLayout(
            *(getattr(self, field.name).to(device) for field in dataclasses.fields(self))
        )


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer's attention does beside being causal."""

    scale: float
    sliding_window: int = 0
    """Last positions that a token sees, its own included; 0 is all."""
    softcap: float = 0.0
    """Bound of the scores by `softcap * tanh(score / softcap)`; 0 is none."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer: f32[num_blocks, block_size, kv_heads, head_dim] each."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def size_bytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes


class Ops(Protocol):
    """The kernels that an engine needs. Activations are float32."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `x @ weight.T + bias`: f32[T, K], bf16|f16|f32[N, K], f32[N] -> f32[T, N]."""
        ...

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, layout: StepLayout
    ) -> None:
        """Put `k`, `v` f32[T, kv_heads, head_dim] into the cache."""
        ...

    def attend(
        self, q: torch.Tensor, cache: LayerCache, layout: StepLayout, spec: AttentionSpec
    ) -> torch.Tensor:
        """Return causal attention over the cache: f32[T, heads, head_dim] of the same shape."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return `x / sqrt(mean(x^2) + eps) * weight` over the last axis of f32[T, K]."""
        ...

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Return `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis."""
        ...

    def activate(
        self, activation: Activation, gate: torch.Tensor, up: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `activation(gate)`, times `up` if there is one, of f32[T, K]."""
        ...


class TorchOps:
    """Plain torch, for any device."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Ops.linear`. The weight is widened for each call."""
        return torch.nn.functional.linear(x, weight.float(), bias)

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, layout: StepLayout
    ) -> None:
        """See `Ops.write_kv`."""
        block_tokens = cache.keys.shape[1]
        positions = layout.positions.long()
        blocks = layout.block_tables[layout.seq_index.long(), positions // block_tokens].long()
        place = (blocks, positions % block_tokens)
        cache.keys[place] = k
        cache.values[place] = v

    def attend(
        self, q: torch.Tensor, cache: LayerCache, layout: StepLayout, spec: AttentionSpec
    ) -> torch.Tensor:
        """See `Ops.attend`."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        rows, counts = torch.unique_consecutive(layout.seq_index, return_counts=True)
        first = 0
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            tokens = slice(first, first + count)
            out[tokens] = self._attend_one(
                q[tokens], cache, layout.block_tables[row].long(), layout.positions[tokens], spec
            )
            first += count
        return out

    def _attend_one(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        table: torch.Tensor,
        positions: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        length = int(positions[-1]) + 1
        used = table[: -(-length // cache.keys.shape[1])]
        groups = q.shape[1] // cache.keys.shape[2]
        keys = cache.keys[used].flatten(0, 1)[:length].repeat_interleave(groups, dim=1)
        values = cache.values[used].flatten(0, 1)[:length].repeat_interleave(groups, dim=1)
        scores = torch.einsum("thd,lhd->htl", q, keys) * spec.scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        distance = positions[:, None] - torch.arange(length, device=q.device)
        hidden = distance < 0
        if spec.sliding_window:
            hidden |= distance >= spec.sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("htl,lhd->thd", weights, values)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Ops.rms_norm`."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Ops.layer_norm`."""
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def activate(
        self, activation: Activation, gate: torch.Tensor, up: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Ops.activate`."""
        match activation:
            case Activation.SILU:
                out = torch.nn.functional.silu(gate)
            case Activation.GELU_TANH:
                out = torch.nn.functional.gelu(gate, approximate="tanh")
            case Activation.RELU:
                out = torch.nn.functional.relu(gate)
        return out if up is None else out * up


class NativeOps:
    """gearfall's CPU kernels on `threads` threads."""

    def __init__(self, threads: int) -> None:
        from gearfall.infra.kernels import cpu_kernels

        self._kernels = cpu_kernels
        self._threads = threads
        self.arithmetic = Arithmetic.EXACT
        """Of all passes from now on."""
        self.exact_rows: Mapping[int, int] = {}
        """In the pass under way, how many first rows of so many rows are exact nevertheless."""

    @property
    def threads(self) -> int:
        """Most threads that a kernel uses."""
        return self._threads

    @property
    def is_rounded(self) -> bool:
        """Whether activations are rounded before products with bfloat16 weights."""
        return self.arithmetic is Arithmetic.BF16

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Ops.linear`."""
        return self._kernels.linear(
            x,
            weight,
            bias,
            is_rounded=self.is_rounded,
            exact_rows=self.exact_rows.get(x.shape[0], 0),
            threads=self._threads,
        )

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, layout: StepLayout
    ) -> None:
        """See `Ops.write_kv`."""
        self._kernels.write_kv(
            k,
            v,
            cache.keys,
            cache.values,
            layout.block_tables,
            layout.seq_index,
            layout.positions,
        )

    def attend(
        self, q: torch.Tensor, cache: LayerCache, layout: StepLayout, spec: AttentionSpec
    ) -> torch.Tensor:
        """See `Ops.attend`."""
        return self._kernels.paged_attention(
            q,
            cache.keys,
            cache.values,
            layout.block_tables,
            layout.seq_index,
            layout.positions,
            scale=spec.scale,
            sliding_window=spec.sliding_window,
            softcap=spec.softcap,
            threads=self._threads,
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Ops.rms_norm`."""
        return self._kernels.rms_norm(x, weight, eps=eps)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Ops.layer_norm`."""
        return self._kernels.layer_norm(x, weight, bias, eps=eps)

    def activate(
        self, activation: Activation, gate: torch.Tensor, up: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Ops.activate`."""
        return self._kernels.activate(activation, gate, up)


def ops_for(device: str, threads: int) -> Ops:
    """Return the kernels of `device` and give torch its threads. Raises InvalidRequest."""
    kind = torch.device(device).type
    if kind == "cpu":
        torch.set_num_threads(1)  # the kernels have a pool of their own
        return NativeOps(threads)
    if kind != "cuda" or not torch.cuda.is_available():
        raise InvalidRequest(f"this machine has no device {device!r}", param="device")
    torch.set_num_threads(threads)
    return TorchOps()
