"""Tiny random models as Hugging Face directories and, converted, as mapped partitions."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source
from gearfall.core.checkpoint.manifest import Manifest, manifest_bytes
from gearfall.core.generation.canary import canary_bytes
from gearfall.infra.memory.pool_lease import map_partition
from services.store.models.canary_process import CanaryRequest
from services.store.models.canary_reference import compute_canary

VOCABULARY = 67
CONTEXT_TOKENS = 256

_LLAMA_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": CONTEXT_TOKENS,
}
_OPT_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_TOKENS,
    "word_embed_proj_dim": 48,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_SHAPE),
    "llama-tied": ("LlamaConfig", _LLAMA_SHAPE | {"tie_word_embeddings": True}),
    "llama3-rope": (
        "LlamaConfig",
        _LLAMA_SHAPE
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("MistralConfig", _LLAMA_SHAPE | {"head_dim": 16, "sliding_window": 9}),
    "qwen2": ("Qwen2Config", _LLAMA_SHAPE),
    "qwen3": ("Qwen3Config", _LLAMA_SHAPE | {"head_dim": 16}),
    "phi3": ("Phi3Config", _LLAMA_SHAPE | {"sliding_window": None}),
    "gemma": ("GemmaConfig", _LLAMA_SHAPE | {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        _LLAMA_SHAPE | {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16},
    ),
    "gemma3-mixed": (
        "Gemma3TextConfig",
        _LLAMA_SHAPE
        | {
            "head_dim": 16,
            "sliding_window": 9,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _LLAMA_SHAPE | {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16},
    ),
    "olmo": ("OlmoConfig", _LLAMA_SHAPE | {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2Config", _LLAMA_SHAPE),
    "olmo3": ("Olmo3Config", _LLAMA_SHAPE | {"sliding_window": 9}),
    "granite": (
        "GraniteConfig",
        _LLAMA_SHAPE
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "smollm3": ("SmolLM3Config", _LLAMA_SHAPE | {"no_rope_layer_interval": 2}),
    "stablelm": ("StableLmConfig", _LLAMA_SHAPE | {"hidden_size": 64}),
    "stablelm-parallel": (
        "StableLmConfig",
        _LLAMA_SHAPE | {"hidden_size": 64, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "cohere": ("CohereConfig", _LLAMA_SHAPE | {"logit_scale": 1.0}),
    "cohere2": ("Cohere2Config", _LLAMA_SHAPE | {"sliding_window": 9, "logit_scale": 1.0}),
    "glm4": ("Glm4Config", _LLAMA_SHAPE | {"head_dim": 12}),
    "starcoder2": ("Starcoder2Config", _LLAMA_SHAPE | {"sliding_window": 9}),
    "nemotron": ("NemotronConfig", _LLAMA_SHAPE),
    "seed_oss": ("SeedOssConfig", _LLAMA_SHAPE | {"head_dim": 12}),
    "gpt2": ("GPT2Config", _GPT2_SHAPE),
    "gpt2-scaled": ("GPT2Config", _GPT2_SHAPE | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT2_SHAPE),
    "opt": ("OPTConfig", _OPT_SHAPE),
    "opt-350m": (
        "OPTConfig",
        _OPT_SHAPE | {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "phi": ("PhiConfig", _LLAMA_SHAPE | {"num_key_value_heads": 4}),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_TOKENS,
        },
    ),
    "gpt_neox-serial": (
        "GPTNeoXConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_TOKENS,
            "use_parallel_residual": False,
        },
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertConfig", _LLAMA_SHAPE, "not causal"),
    "gemma3-both-ways": (
        "Gemma3TextConfig",
        _LLAMA_SHAPE | {"head_dim": 16, "use_bidirectional_attention": True},
        "not causal",
    ),
    "falcon": ("FalconConfig", _LLAMA_SHAPE, "attention of their own kind"),
    "falcon-alibi": ("FalconConfig", _LLAMA_SHAPE | {"alibi": True}, "attention of their own kind"),
    "gptj": ("GPTJConfig", _GPT2_SHAPE | {"rotary_dim": 8}, "attention of their own kind"),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4, "seq_length": 64},
        "attention of their own kind",
    ),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        "attention of their own kind",
    ),
    "gpt_oss": (
        "GptOssConfig",
        _LLAMA_SHAPE | {"head_dim": 16, "num_local_experts": 2},
        "attention sinks",
    ),
    "deepseek_v3": ("DeepseekV3Config", _LLAMA_SHAPE, "differ in head size"),
    "mixtral": ("MixtralConfig", _LLAMA_SHAPE | {"num_local_experts": 2}, "form that is not"),
    "lfm2": (
        "Lfm2Config",
        _LLAMA_SHAPE | {"layer_types": ["conv", "full_attention", "conv"]},
        "kinds",
    ),
}
"""Models whose attention or layout gearfall can't serve exactly, and what it says about them."""


def random_model(family: str, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Return a seeded model whose greedy answers wander instead of repeating one token."""
    torch.set_num_threads(1)  # threads that wait for a busy machine's cores cost seconds
    kind, shape = CONFIGS[family] if family in CONFIGS else REFUSED[family][:2]
    config = getattr(transformers, kind)(**shape, initializer_range=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    stored: PreTrainedModel = model.to(dtype).eval()
    return stored


@dataclass(frozen=True, slots=True)
class TinyCheckpoint:
    """A converted checkpoint whose partitions lie in memfds, as the store's pool would hold it."""

    directory: Path
    manifest: Manifest
    config_json: bytes
    partition_fds: tuple[int, ...]

    @property
    def manifest_json(self) -> bytes:
        return manifest_bytes(self.manifest)

    @property
    def canary_json(self) -> bytes:
        facts = self.manifest.model
        request = CanaryRequest(
            str(self.directory), facts.vocabulary_size, facts.bos_token_id, facts.context_tokens
        )
        return canary_bytes(compute_canary(request))

    def map(self):
        return [
            map_partition(descriptor, partition.size_bytes)
            for descriptor, partition in zip(
                self.partition_fds, self.manifest.partitions, strict=True
            )
        ]

    def reference(self) -> PreTrainedModel:
        """transformers' own model on the same bytes, in float32."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=torch.float32, attn_implementation="eager"
        )
        model.eval()
        return model


@contextmanager
def tiny_checkpoint(model: PreTrainedModel, directory: Path, *, ranks: int = 1):
    """Save a model, convert it with the store's converter and hold it in memory."""
    model.save_pretrained(directory / "source")
    converted = directory / ("converted" if ranks == 1 else f"converted-{ranks}")
    with hold_in_memory(directory / "source", converted, ranks=ranks) as checkpoint:
        yield checkpoint


@contextmanager
def hold_in_memory(source: Path, converted: Path, *, ranks: int = 1):
    """Convert a Hugging Face directory and hold its partitions in memfds."""
    converted.mkdir()
    with open_source(str(source)) as opened:
        manifest = convert(opened, converted, lambda done, total: None, ranks=ranks)
    descriptors = []
    try:
        for partition in manifest.partitions:
            descriptor = os.memfd_create(partition.file)
            descriptors.append(descriptor)
            with (converted / partition.file).open("rb") as file:
                os.sendfile(descriptor, file.fileno(), 0, partition.size_bytes)
        yield TinyCheckpoint(
            source, manifest, (source / "config.json").read_bytes(), tuple(descriptors)
        )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
