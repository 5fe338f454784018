"""What the native decoder needs of a transformers model, family by family.

A model is known when every module that counts is the stand-in that it is expected to be; whatever
else it has sends it through transformers' own code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gearfall.infra.kernels.cpu_decoder import Layer, Linear
from gearfall.infra.kernels.cpu_kernels import Activation
from services.worker.engine.model.activations import KernelActivation
from services.worker.engine.model.modules import (
    GatedMlp,
    LayerNorm,
    RmsNorm,
    ScaledEmbedding,
    StoredEmbedding,
    StoredLinear,
)
from services.worker.engine.model.ops import AttentionSpec, LayerCache
from services.worker.engine.model.rotary import LayeredRotaryTable, RotaryTable

LayerCaches = Mapping[int, tuple[LayerCache, AttentionSpec]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some output rows of a module's product."""

    module: StoredLinear
    first: int
    end: int

    def linear(self) -> Linear:
        """Return them as the decoder takes them."""
        bias = self.module.bias
        rows = slice(self.first, self.end)
        return Linear(self.module.weight[rows], None if bias is None else bias[rows])


Sites = Mapping[str, Rows]
"""A layer's products by the decoder's `SITES`."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A model as the decoder takes it."""

    embedding: torch.Tensor
    layers: Sequence[Layer]
    sites: Sequence[Sites]
    norm: RmsNorm | LayerNorm
    head: Linear
    activation: Activation
    rotary: RotaryTable | None = None
    local_rotary: RotaryTable | None = None
    embedding_scale: float = 1.0
    positions: torch.Tensor | None = None
    """[P + position_offset, K]"""
    position_offset: int = 0
    logit_cap: float = 0.0
    """Bound of the logits by `cap * tanh(logit / cap)`; 0 is none."""


class _UnknownError(Exception):
    """The model has something that the decoder does not compute."""


def parts_of(model: Any, caches: LayerCaches) -> Parts | None:
    """Return the parts of a model whose layers have all attended once, None if it is not known.

    `model` is transformers' (its modules are untyped), with stand-ins in place.
    """
    find = _FAMILIES.get(type(model).__name__)
    if find is None:
        return None
    try:
        parts: Parts = find(model, caches)
    except _UnknownError:
        return None
    same_shape = len({cache.keys.shape for cache, _ in caches.values()}) == 1
    return parts if same_shape and set(caches) == set(range(len(parts.layers))) else None


def _rotary_parts(model: Any, caches: LayerCaches) -> Parts:
    """Llama's kind, with what Qwen3, Phi-3 and Gemma change of it."""
    inner, config = model.model, model.config
    embedding, head, rotary = inner.embed_tokens, model.lm_head, inner.rotary_emb
    _require(type(embedding) in {StoredEmbedding, ScaledEmbedding})
    _require(type(rotary) in {RotaryTable, LayeredRotaryTable})
    is_layered = type(rotary) is LayeredRotaryTable
    types = tuple(config.layer_types) if is_layered else ("full_attention",) * len(inner.layers)
    norm = _rms(inner.norm)
    sites = [_rotary_sites(layer) for layer in inner.layers]
    activations = {_gated_activation(layer.mlp) for layer in inner.layers}
    _require(len(activations) == 1)
    layers = [
        _rotary_layer(layer, sites[index], *caches[index], eps=norm.eps, kind=types[index])
        for index, layer in enumerate(inner.layers)
    ]
    return Parts(
        embedding=embedding.weight,
        layers=layers,
        sites=sites,
        norm=norm,
        head=_whole(head).linear(),
        activation=activations.pop(),
        rotary=_table_of("full_attention", rotary, types),
        local_rotary=_table_of("sliding_attention", rotary, types),
        embedding_scale=embedding.scale if type(embedding) is ScaledEmbedding else 1.0,
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _table_of(kind: str, rotary: Any, types: Sequence[str]) -> RotaryTable | None:
    """Return the table by which layers of one kind are rotated, None where there is no such one."""
    if kind not in types:
        return None
    found: RotaryTable = rotary.table(kind) if type(rotary) is LayeredRotaryTable else rotary
    return found


def _rotary_layer(
    layer: Any, sites: Sites, cache: LayerCache, spec: AttentionSpec, *, eps: float, kind: str
) -> Layer:
    attention = layer.self_attn
    norms: dict[str, torch.Tensor | None] = {
        "attention_norm": _rms(layer.input_layernorm, eps).weight,
        "q_norm": _maybe_rms(attention, "q_norm", eps),
        "k_norm": _maybe_rms(attention, "k_norm", eps),
    }
    if hasattr(layer, "pre_feedforward_layernorm"):
        norms["post_attention_norm"] = _rms(layer.post_attention_layernorm, eps).weight
        norms["mlp_norm"] = _rms(layer.pre_feedforward_layernorm, eps).weight
        norms["post_mlp_norm"] = _rms(layer.post_feedforward_layernorm, eps).weight
    else:
        norms["mlp_norm"] = _rms(layer.post_attention_layernorm, eps).weight
    return _layer(sites, cache, spec, norms, is_local=kind == "sliding_attention")


def _rotary_sites(layer: Any) -> Sites:
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        q_rows = attention.config.num_attention_heads * attention.head_dim
        q, k, v = _three(attention.qkv_proj, q_rows)
    else:
        q, k, v = (_whole(getattr(attention, f"{name}_proj")) for name in "qkv")
    if hasattr(mlp, "gate_up_proj"):
        both = _whole(mlp.gate_up_proj)
        gate = Rows(both.module, 0, both.end // 2)
        up = Rows(both.module, both.end // 2, both.end)
    else:
        gate, up = _whole(mlp.gate_proj), _whole(mlp.up_proj)
    o, down = _whole(attention.o_proj), _whole(mlp.down_proj)
    return _checked({"q": q, "k": k, "v": v, "o": o, "gate": gate, "up": up, "down": down})


def _gated_activation(mlp: Any) -> Activation:
    if type(mlp) is GatedMlp:
        return Activation.SILU
    return _activation(getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None))


def _gpt2_parts(model: Any, caches: LayerCaches) -> Parts:
    inner = model.transformer
    _require(type(inner.wte) is StoredEmbedding and type(inner.wpe) is StoredEmbedding)
    norm = _layer_norm(inner.ln_f)
    sites, layers, activations = [], [], set()
    for index, block in enumerate(inner.h):
        attention, mlp = block.attn, block.mlp
        _require(not hasattr(block, "crossattention"))
        q, k, v = _three(attention.c_attn, attention.split_size)
        products = {"q": q, "k": k, "v": v, "o": _whole(attention.c_proj)}
        products |= {"gate": _whole(mlp.c_fc), "down": _whole(mlp.c_proj)}
        sites.append(_checked(products))
        norms = _two_norms(block.ln_1, block.ln_2, norm.eps)
        layers.append(_layer(products, *caches[index], norms))
        activations.add(_activation(mlp.act))
    _require(len(activations) == 1)
    return Parts(
        embedding=inner.wte.weight,
        layers=layers,
        sites=sites,
        norm=norm,
        head=_whole(model.lm_head).linear(),
        activation=activations.pop(),
        positions=inner.wpe.weight,
    )


def _opt_parts(model: Any, caches: LayerCaches) -> Parts:
    inner = model.model.decoder
    _require(type(inner.embed_tokens) is StoredEmbedding)
    _require(inner.project_in is None and inner.project_out is None)
    norm = _layer_norm(inner.final_layer_norm)
    sites, layers, activations = [], [], set()
    for index, layer in enumerate(inner.layers):
        attention = layer.self_attn
        _require(layer.do_layer_norm_before)
        products = {name: _whole(getattr(attention, f"{name}_proj")) for name in "qkv"}
        products |= {"o": _whole(attention.out_proj), "gate": _whole(layer.fc1)}
        products["down"] = _whole(layer.fc2)
        sites.append(_checked(products))
        norms = _two_norms(layer.self_attn_layer_norm, layer.final_layer_norm, norm.eps)
        scale = float(attention.scaling)
        layers.append(_layer(products, *caches[index], norms, q_scale=scale))
        activations.add(_activation(layer.activation_fn))
    _require(len(activations) == 1)
    return Parts(
        embedding=inner.embed_tokens.weight,
        layers=layers,
        sites=sites,
        norm=norm,
        head=_whole(model.lm_head).linear(),
        activation=activations.pop(),
        positions=inner.embed_positions.weight,
        position_offset=inner.embed_positions.offset,
    )


_FAMILIES = {
    "GPT2LMHeadModel": _gpt2_parts,
    "Gemma2ForCausalLM": _rotary_parts,
    "Gemma3ForCausalLM": _rotary_parts,
    "GemmaForCausalLM": _rotary_parts,
    "LlamaForCausalLM": _rotary_parts,
    "MistralForCausalLM": _rotary_parts,
    "OPTForCausalLM": _opt_parts,
    "Phi3ForCausalLM": _rotary_parts,
    "Qwen2ForCausalLM": _rotary_parts,
    "Qwen3ForCausalLM": _rotary_parts,
}
"""Classes that compute what `infra.kernels.cpu_decoder` does, between embedding and head."""


def _layer(
    sites: Sites,
    cache: LayerCache,
    spec: AttentionSpec,
    norms: Mapping[str, Any],
    *,
    is_local: bool = False,
    q_scale: float = 1.0,
) -> Layer:
    return Layer(
        q=sites["q"].linear(),
        k=sites["k"].linear(),
        v=sites["v"].linear(),
        o=sites["o"].linear(),
        gate=sites["gate"].linear(),
        up=sites["up"].linear() if "up" in sites else None,
        down=sites["down"].linear(),
        k_cache=cache.keys,
        v_cache=cache.values,
        scale=spec.scale,
        sliding_window=spec.sliding_window,
        softcap=spec.softcap,
        is_local=is_local,
        q_scale=q_scale,
        **{"q_norm": None, "k_norm": None, **norms},
    )


def _require(holds: object) -> None:
    if not holds:
        raise _UnknownError


def _checked(sites: Sites) -> Sites:
    """Return them if products of the same tokens have weights of one dtype."""
    for group in (("q", "k", "v"), ("gate", "up")):
        _require(len({sites[s].module.weight.dtype for s in group if s in sites}) == 1)
    return sites


def _whole(module: Any) -> Rows:
    _require(type(module) is StoredLinear)
    return Rows(module, 0, module.weight.shape[0])


def _three(module: Any, q_rows: int) -> tuple[Rows, Rows, Rows]:
    """A product of queries, keys and values, the latter two alike."""
    end = _whole(module).end
    middle = q_rows + (end - q_rows) // 2
    return Rows(module, 0, q_rows), Rows(module, q_rows, middle), Rows(module, middle, end)


def _activation(module: Any) -> Activation:
    _require(type(module) is KernelActivation)
    kind: Activation = module.kind
    return kind


def _rms(module: Any, eps: float | None = None) -> RmsNorm:
    _require(type(module) is RmsNorm and eps in {None, module.eps})
    norm: RmsNorm = module
    return norm


def _maybe_rms(owner: nn.Module, name: str, eps: float) -> torch.Tensor | None:
    return _rms(getattr(owner, name), eps).weight if hasattr(owner, name) else None


def _layer_norm(module: Any, eps: float | None = None) -> LayerNorm:
    _require(type(module) is LayerNorm and eps in {None, module.eps})
    norm: LayerNorm = module
    return norm


def _two_norms(attention: Any, mlp: Any, eps: float) -> Mapping[str, torch.Tensor]:
    one, other = _layer_norm(attention, eps), _layer_norm(mlp, eps)
    return {
        "attention_norm": one.weight,
        "attention_norm_bias": one.bias,
        "mlp_norm": other.weight,
        "mlp_norm_bias": other.bias,
    }
