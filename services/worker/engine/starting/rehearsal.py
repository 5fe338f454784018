"""A trial start of a tiny model, by which a process has done once what every engine does first.

A forked process shares its parent's memory until it writes to it, and Python writes to whatever it
touches. An engine that has built and run a model before has those pages to itself already, and
whatever is made at its first use.
"""

import gc
import json
import mmap

import numpy as np
import torch

from gearfall.core.checkpoint.manifest import (
    PAGE_BYTES,
    Manifest,
    ModelFacts,
    PartitionEntry,
    TensorEntry,
    checksum,
    manifest_bytes,
    parse_manifest,
)
from services.worker.engine.batching.packing import PackedStep
from services.worker.engine.model.engine_model import build_model
from services.worker.engine.model.ops import NativeOps

_WIDTH, _HEAD, _VOCABULARY, _CONTEXT_TOKENS = 64, 32, 64, 64
_LAYER = {
    "self_attn.q_proj": (_WIDTH, _WIDTH),
    "self_attn.k_proj": (_WIDTH, _WIDTH),
    "self_attn.v_proj": (_WIDTH, _WIDTH),
    "self_attn.o_proj": (_WIDTH, _WIDTH),
    "mlp.gate_proj": (_WIDTH, _WIDTH),
    "mlp.up_proj": (_WIDTH, _WIDTH),
    "mlp.down_proj": (_WIDTH, _WIDTH),
    "input_layernorm": (_WIDTH,),
    "post_attention_layernorm": (_WIDTH,),
}
_SHAPES = {
    "model.embed_tokens.weight": (_VOCABULARY, _WIDTH),
    **{f"model.layers.0.{name}.weight": shape for name, shape in _LAYER.items()},
    "model.norm.weight": (_WIDTH,),
    "lm_head.weight": (_VOCABULARY, _WIDTH),
}
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": _WIDTH // _HEAD,
    "num_key_value_heads": _WIDTH // _HEAD,
    "head_dim": _HEAD,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": _CONTEXT_TOKENS,
    "tie_word_embeddings": False,
}


def rehearse() -> None:
    """Build a Llama of one layer and compute two steps of it, on the calling thread alone."""
    manifest = parse_manifest(manifest_bytes(_manifest()))
    memory = mmap.mmap(-1, manifest.size_bytes)
    model = build_model(
        manifest,
        [memory],
        json.dumps(_CONFIG).encode(),
        ops=NativeOps(1),
        device=torch.device("cpu"),
        kv_blocks=2,
    )
    for position in (0, 1):
        logits = model.forward(_step(position))
        assert logits.shape == (1, _VOCABULARY)
    gc.collect()
    gc.freeze()


def _manifest() -> Manifest:
    tensors, offset = [], 0
    for name, shape in _SHAPES.items():
        size = 2 * int(np.prod(shape))
        tensors.append(TensorEntry(name, "bfloat16", shape, 0, offset, size))
        offset += -(-size // PAGE_BYTES) * PAGE_BYTES
    partition = PartitionEntry("partition-0.bin", offset, offset, (checksum(bytes(offset)),))
    facts = ModelFacts(
        architecture="LlamaForCausalLM",
        parameters=sum(int(np.prod(shape)) for shape in _SHAPES.values()),
        context_tokens=_CONTEXT_TOKENS,
        vocabulary_size=_VOCABULARY,
        bos_token_id=None,
        eos_token_ids=(),
        dtype="bfloat16",
        layers=1,
        kv_heads=_WIDTH // _HEAD,
        head_dim=_HEAD,
        has_chat_template=False,
    )
    return Manifest(format_version=1, model=facts, partitions=(partition,), tensors=tuple(tensors))


def _step(position: int) -> PackedStep:
    return PackedStep(
        token_ids=np.array([1], dtype=np.int64),
        positions=np.array([position], dtype=np.int32),
        seq_index=np.zeros(1, dtype=np.int32),
        block_tables=np.zeros((1, 1), dtype=np.int32),
        logit_rows=np.zeros(1, dtype=np.int64),
    )
