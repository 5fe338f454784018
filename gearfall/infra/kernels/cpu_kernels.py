"""Batch-invariant CPU kernels of the engine, over torch tensors.

Every output row is a function of that token's inputs alone, bit for bit: the other rows of a
batch, their number, the thread count, prefill against decode and the machine's vector width change
nothing. Activations and sums are float32; bfloat16 and float16 weights are widened exactly. Where
a call asks for it, activations are rounded to bfloat16 for products with bfloat16 weights; the bits
are then those of AVX512_BF16's instruction on every machine, and emulated where it is missing.

Inputs may have any strides as long as the elements of the last dimension are adjacent (of a weight
those of either); caches,
tables and indices are contiguous. All calls release the GIL, start no thread before one pays (so a
parent may import this and fork), and raise ValueError before they touch memory that an argument
does not own. `threads` is the most threads a call may use, the caller's own included, up to
256; leave torch's own pool one thread beside them.
`variant` names one of `variants()` and exists for tests: all of them give the same bits.
"""

from enum import Enum

import torch

from gearfall import _cuda_ext

_DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int32: 3,
}


class Activation(Enum):
    """Functions of single elements, by the binding's codes."""

    SILU = 0
    """x * sigmoid(x)"""
    GELU_TANH = 1
    """The approximation of gelu by a hyperbolic tangent."""
    RELU = 2


View = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def variants() -> tuple[str, ...]:
    """Return the instruction sets that this machine can run, fastest first."""
    return tuple(_cuda_ext.cpu_variants())


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    is_rounded: bool = False,
    exact_rows: int = 0,
    threads: int = 1,
    variant: str = "",
) -> torch.Tensor:
    """Return `x @ weight.T + bias` as f32[T, N].

    `x` f32[T, K], `weight` and `bias` f32 | bf16 | f16 [N, K] and [N]. A weight may be transposed,
    its columns adjacent: it is multiplied as it lies, `x` never rounded. With `is_rounded`, and a
    bfloat16 weight, `x` is rounded to bfloat16 first, but for its first `exact_rows`; products and
    sums stay float32.
    """
    out = x.new_empty((x.shape[0], weight.shape[0]) if x.dim() == 2 and weight.dim() == 2 else 0)
    _cuda_ext.cpu_linear(
        view_of(x),
        view_of(weight),
        None if bias is None else view_of(bias),
        view_of(out),
        threads,
        variant,
        is_rounded,
        exact_rows,
    )
    return out


def write_kv(  # noqa: PLR0917 (a kernel has its operands)
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_index: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Copy this step's keys and values into the paged cache.

    `k`, `v` f32[T, Hkv, D]; caches f32[num_blocks, block_size, Hkv, D], changed in place;
    `block_tables` int32[S, max_blocks]; `seq_index`, `positions` int32[T]: token t is at cache
    position `positions[t]` of sequence `seq_index[t]`.
    """
    _cuda_ext.cpu_write_kv(
        view_of(k),
        view_of(v),
        view_of(k_cache),
        view_of(v_cache),
        view_of(block_tables),
        view_of(seq_index),
        view_of(positions),
    )


def paged_attention(  # noqa: PLR0917 (a kernel has its operands)
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_index: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    threads: int = 1,
    variant: str = "",
) -> torch.Tensor:
    """Return causal attention over the paged cache as f32[T, Hq, D].

    `q` f32[T, Hq, D] with Hq a multiple of Hkv; the rest as in `write_kv`, which ran before: token
    t sees cache positions 0 to `positions[t]` of its sequence, the last `sliding_window` of them
    if that is not 0. Scores are multiplied by `scale`, then, if `softcap` is not 0, bounded by
    `softcap * tanh(s / softcap)`. Tokens of one sequence that stand side by side share their reads.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _cuda_ext.cpu_paged_attention(
        view_of(q),
        view_of(k_cache),
        view_of(v_cache),
        view_of(block_tables),
        view_of(seq_index),
        view_of(positions),
        view_of(out),
        scale,
        sliding_window,
        softcap,
        threads,
        variant,
    )
    return out


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, variant: str = ""
) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the rows of `x` as f32[T, K].

    `x` f32[T, K], `weight` f32 | bf16 | f16 [K].
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _cuda_ext.cpu_rms_norm(view_of(x), view_of(weight), view_of(out), eps, variant)
    return out


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float, variant: str = ""
) -> torch.Tensor:
    """Return `(x - mean) / sqrt(variance + eps) * weight + bias` over the rows of `x` f32[T, K].

    `weight`, `bias` f32 | bf16 | f16 [K].
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    views = (view_of(x), view_of(weight), view_of(bias), view_of(out))
    _cuda_ext.cpu_layer_norm(*views, eps, variant)
    return out


def activate(
    activation: Activation,
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    variant: str = "",
) -> torch.Tensor:
    """Return `activation(gate)`, times `up` if there is one, as f32[T, K]; both f32[T, K].

    torch's own functions differ in the last bit between a vector's body and its tail, so their
    results depend on where in the batch an element lies.
    """
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _cuda_ext.cpu_activate(
        activation.value,
        view_of(gate),
        None if up is None else view_of(up),
        view_of(out),
        variant,
    )
    return out


def view_of(tensor: torch.Tensor) -> View:
    """Return (address, dtype code, shape, strides) for the binding, which checks them."""
    code = _DTYPE_CODES.get(tensor.dtype)
    if code is None or not tensor.is_cpu:
        raise ValueError(f"a {tensor.dtype} tensor on {tensor.device} is not for the CPU kernels")
    return tensor.data_ptr(), code, tensor.shape, tensor.stride()
