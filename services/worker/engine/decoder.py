"""A model of Llama's kind through one native call a step, where transformers would take hundreds.

Which kinds that is, is decided by the stand-ins that the model's first pass has left in place. The
result has the bits that the stand-ins give one by one, so a model may change between both ways from
step to step: an adapter that updates the embedding or the head goes through the stand-ins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gearfall.infra.cpu_decoder import (
    SITES,
    AdapterTokens,
    Decoder,
    Layer,
    Linear,
    LowRank,
    Step,
)
from services.worker.engine.lora import Factors
from services.worker.engine.modules import GatedMlp, RmsNorm, StoredEmbedding, StoredLinear
from services.worker.engine.ops import AttentionSpec, LayerCache, NativeOps, Ops
from services.worker.engine.packing import PackedStep
from services.worker.engine.rotary import RotaryTable

_KINDS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
"""Classes that compute what `gearfall.infra.cpu_decoder` does, between embedding and head."""

LayerSites = Mapping[str, nn.Module]
"""Modules of a layer's products, by the decoder's `SITES`."""
LayerCaches = Mapping[int, tuple[LayerCache, AttentionSpec]]


class NativePass:
    """The forward pass of one model."""

    def __init__(
        self, decoder: Decoder, rotary: RotaryTable, ops: NativeOps, sites: Sequence[LayerSites]
    ) -> None:
        self._decoder = decoder
        self._rotary = rotary
        self._ops = ops
        self._sites = sites
        self._adapters: dict[str, int] = {}
        self._strange: set[str] = set()
        self._attached = 0

    def knows(self, digest: str) -> bool:
        """Whether an adapter was learnt and not forgotten."""
        return digest in self._adapters or digest in self._strange

    def learn(self, digest: str, updates: Mapping[nn.Module, Factors]) -> None:
        """Know an adapter from now on."""
        layers = [
            {
                site: LowRank(updates[module].a, updates[module].b, updates[module].scale)
                for site, module in sites.items()
                if module in updates
            }
            for sites in self._sites
        ]
        if sum(map(len, layers)) != len(updates):
            self._strange.add(digest)
            return
        self._decoder.attach(self._attached, layers)
        self._adapters[digest] = self._attached
        self._attached += 1

    def forget(self, digest: str) -> None:
        """Let go of an adapter. Idempotent."""
        self._strange.discard(digest)
        number = self._adapters.pop(digest, None)
        if number is not None:
            self._decoder.detach(number)

    def can_compute(self, step: PackedStep) -> bool:
        """Whether all adapters of a step update only products of layers; they must be known."""
        return all(group.adapter in self._adapters for group in step.adapters)

    def logits(self, step: PackedStep) -> torch.Tensor:
        """Compute a step that can be; return f32[R, vocabulary], R as in `logit_rows`."""
        cos, sin = self._rotary.table(int(step.positions.max()) + 1)
        native = Step(
            token_ids=torch.from_numpy(step.token_ids.astype(np.int32)),
            cos=cos,
            sin=sin,
            block_tables=torch.from_numpy(step.block_tables),
            seq_index=torch.from_numpy(step.seq_index),
            positions=torch.from_numpy(step.positions),
            logit_rows=torch.from_numpy(step.logit_rows.astype(np.int32)),
            adapters=[
                AdapterTokens(
                    self._adapters[group.adapter],
                    torch.from_numpy(group.tokens.astype(np.int32)),
                )
                for group in step.adapters
            ],
        )
        return self._decoder.run(native, threads=self._ops.threads, is_rounded=self._ops.is_rounded)

    def seconds(self) -> Mapping[str, float]:
        """Return the seconds spent in each phase so far; see `Decoder.seconds`."""
        return self._decoder.seconds()


def find_native_pass(model: Any, caches: LayerCaches, ops: Ops) -> NativePass | None:
    """Return the native pass of a model whose layers have all attended once, None if it has none.

    `model` is transformers' (its modules are untyped), with stand-ins in place. The pass reads the
    same weights and caches.
    """
    if type(model).__name__ not in _KINDS or not isinstance(ops, NativeOps):
        return None
    inner = model.model
    layers = list(inner.layers)
    rotary, embedding, norm, head = inner.rotary_emb, inner.embed_tokens, inner.norm, model.lm_head
    is_known = (
        type(rotary) is RotaryTable
        and type(embedding) is StoredEmbedding
        and type(norm) is RmsNorm
        and type(head) is StoredLinear
        and all(_is_known(layer, norm.eps) for layer in layers)
        and set(caches) == set(range(len(layers)))
        and len({cache.keys.shape for cache, _ in caches.values()}) == 1
    )
    if not is_known:
        return None
    decoder = Decoder(
        embedding=embedding.weight,
        layers=[_layer(layer, *caches[index]) for index, layer in enumerate(layers)],
        norm=norm.weight,
        head=_linear(head),
        eps=norm.eps,
    )
    return NativePass(decoder, rotary, ops, [_sites(layer) for layer in layers])


def _is_known(layer: Any, eps: float) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention)]
    if type(mlp) is not GatedMlp or not all(type(n) is RmsNorm and n.eps == eps for n in norms):
        return False
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    linears = [q, k, v, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return all(type(linear) is StoredLinear for linear in linears) and (
        q.weight.dtype == k.weight.dtype == v.weight.dtype
        and mlp.gate_proj.weight.dtype == mlp.up_proj.weight.dtype
    )


def _head_norms(attention: Any) -> list[Any]:
    return [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]


def _layer(layer: Any, cache: LayerCache, spec: AttentionSpec) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        attention_norm=layer.input_layernorm.weight,
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        o=_linear(attention.o_proj),
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        k_cache=cache.keys,
        v_cache=cache.values,
        scale=spec.scale,
        sliding_window=spec.sliding_window,
        softcap=spec.softcap,
    )


def _sites(layer: Any) -> LayerSites:
    attention, mlp = layer.self_attn, layer.mlp
    parts = (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )
    return dict(zip(SITES, parts, strict=True))


def _linear(module: StoredLinear) -> Linear:
    return Linear(module.weight, module.bias)
