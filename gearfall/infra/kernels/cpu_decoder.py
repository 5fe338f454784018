"""Decoders on the CPU: a whole step of the batch as one native call.

The bits are those of the single kernels of `cpu_kernels` called one after another;
what is said there of batches, threads and instruction sets holds here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gearfall import _cuda_ext
from gearfall.infra.kernels.cpu_kernels import Activation, View, view_of


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight.T + bias`."""

    weight: torch.Tensor
    """f32 | bf16 | f16 [N, K], any distance between rows."""
    bias: torch.Tensor | None = None
    """f32 | bf16 | f16 [N]"""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer and its part of the paged cache.

    With a = attention_norm(x),
    x += post_attention_norm(o(attention(rotate(q_norm(q(a) * q_scale)), rotate(k_norm(k(a))),
    v(a)))), then with b = mlp_norm(x), x += post_mlp_norm(down(activation(gate(b)) * up(b))). What
    is None is left out. A norm that has a bias is a layer norm, any other a root mean square norm;
    they are f32. `q`, `k`, `v` share a dtype, `gate` and `up` too.
    """

    attention_norm: torch.Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate: Linear
    up: Linear | None
    down: Linear
    k_cache: torch.Tensor
    """f32[num_blocks, block_size, Hkv, D], of one shape in all layers."""
    v_cache: torch.Tensor
    scale: float
    sliding_window: int = 0
    softcap: float = 0.0
    attention_norm_bias: torch.Tensor | None = None
    mlp_norm_bias: torch.Tensor | None = None
    post_attention_norm: torch.Tensor | None = None
    post_mlp_norm: torch.Tensor | None = None
    is_local: bool = False
    """Whether it is rotated by the step's local tables."""
    q_scale: float = 1.0


SITES = ("q", "k", "v", "o", "gate", "up", "down")
"""Products of a layer that an adapter may update."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What a LoRA adapter adds to a product of x: `scale * ((x @ a.T) @ b.T)`."""

    a: torch.Tensor
    """f32 | bf16 | f16 [rank, K]"""
    b: torch.Tensor
    """f32 | bf16 | f16 [N, rank]"""
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterTokens:
    """Tokens of a step that run with an adapter."""

    adapter: int
    tokens: torch.Tensor
    """int32[n]"""


@dataclass(frozen=True, slots=True)
class Step:
    """T tokens of S sequences side by side."""

    token_ids: torch.Tensor
    """int32[T]"""
    cos: torch.Tensor
    """f32[P, R]: of each position; the first R elements of a head are rotated."""
    sin: torch.Tensor
    block_tables: torch.Tensor
    """int32[S, max_blocks]"""
    seq_index: torch.Tensor
    """int32[T]"""
    positions: torch.Tensor
    """int32[T]"""
    logit_rows: torch.Tensor
    """int32[L], L <= T: tokens whose logits are wanted."""
    adapters: Sequence[AdapterTokens] = ()
    """One for each adapter in the step, which must be attached; a token is in one at most."""
    local_cos: torch.Tensor | None = None
    """Like `cos`, for layers that are local."""
    local_sin: torch.Tensor | None = None


class Decoder:
    """A decoder over weights and caches that it keeps alive and never copies."""

    def __init__(
        self,
        *,
        embedding: torch.Tensor,
        layers: Sequence[Layer],
        norm: torch.Tensor,
        head: Linear,
        eps: float,
        norm_bias: torch.Tensor | None = None,
        activation: Activation = Activation.SILU,
        embedding_scale: float = 1.0,
        positions: torch.Tensor | None = None,
        position_offset: int = 0,
    ) -> None:
        """`embedding` f32 | bf16 | f16 [V, K], `head` [N, K], `norm` f32[K], `eps` of all norms.

        A token's first x is its row of `embedding` times `embedding_scale`, plus the row of
        `positions` [P, K] at its position and `position_offset`.

        Raises ValueError for parts that do not fit each other.
        """
        self._kept = (embedding, tuple(layers), norm, head, norm_bias, positions)
        self._outputs = head.weight.shape[0]
        self._adapters: dict[int, Sequence[Mapping[str, LowRank]]] = {}
        self._native = _cuda_ext.CpuDecoder(
            view_of(embedding),
            [_parts(layer) for layer in layers],
            view_of(norm),
            _pair(head),
            eps,
            _maybe(norm_bias),
            activation.value,
            embedding_scale,
            _maybe(positions),
            position_offset,
        )

    def run(
        self, step: Step, *, threads: int, is_rounded: bool = False, variant: str = ""
    ) -> torch.Tensor:
        """Compute a step: keys and values go to the caches, the wanted logits f32[L, N] come back.

        `is_rounded` as in `cpu_kernels.linear`, for all products with weights.

        Raises ValueError before anything is computed. One caller's step at a time is computed.
        """
        logits = torch.empty(step.logit_rows.shape[0], self._outputs)
        self._native.run(
            view_of(step.token_ids),
            view_of(step.cos),
            view_of(step.sin),
            _maybe(step.local_cos),
            _maybe(step.local_sin),
            view_of(step.block_tables),
            view_of(step.seq_index),
            view_of(step.positions),
            view_of(step.logit_rows),
            view_of(logits),
            threads,
            variant,
            is_rounded,
            [(each.adapter, view_of(each.tokens)) for each in step.adapters],
        )
        return logits

    def attach(self, adapter: int, layers: Sequence[Mapping[str, LowRank]]) -> None:
        """Make steps able to name `adapter`: its updates of each layer, by `SITES`.

        They are kept alive until it is detached. Raises ValueError for what does not fit.
        """
        updates = [tuple(_update(layer.get(site)) for site in SITES) for layer in layers]
        self._native.attach(adapter, updates)
        self._adapters[adapter] = layers

    def detach(self, adapter: int) -> None:
        """Forget an adapter. Idempotent."""
        self._native.detach(adapter)
        self._adapters.pop(adapter, None)

    def seconds(self) -> Mapping[str, float]:
        """Return the seconds spent since the decoder was made: row, projection, attention, mlp,
        head; `row` is norms, rotary embeddings and keys and values put into the cache.
        """
        return self._native.seconds()


def _parts(layer: Layer) -> tuple[object, ...]:
    """A layer as the binding reads it."""
    return (
        view_of(layer.attention_norm),
        _pair(layer.q),
        _pair(layer.k),
        _pair(layer.v),
        _pair(layer.o),
        _maybe(layer.q_norm),
        _maybe(layer.k_norm),
        view_of(layer.mlp_norm),
        _pair(layer.gate),
        None if layer.up is None else _pair(layer.up),
        _pair(layer.down),
        view_of(layer.k_cache),
        view_of(layer.v_cache),
        layer.scale,
        layer.sliding_window,
        layer.softcap,
        _maybe(layer.attention_norm_bias),
        _maybe(layer.mlp_norm_bias),
        _maybe(layer.post_attention_norm),
        _maybe(layer.post_mlp_norm),
        layer.is_local,
        layer.q_scale,
    )


def _maybe(tensor: torch.Tensor | None) -> View | None:
    return None if tensor is None else view_of(tensor)


def _update(update: LowRank | None) -> tuple[object, object, float] | None:
    return None if update is None else (view_of(update.a), view_of(update.b), update.scale)


def _pair(linear: Linear) -> tuple[object, object]:
    return view_of(linear.weight), _maybe(linear.bias)
