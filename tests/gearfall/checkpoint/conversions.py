"""Small models saved by safetensors itself, and their checkpoints read whole into memory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source
from gearfall.core.checkpoint.manifest import Manifest

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 22,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 22,
    "n_embd": 24,
    "n_layer": 1,
    "n_head": 6,
    "n_positions": 32,
}


def llama_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of a Llama of `LLAMA`, MLP width 10."""
    random = torch.Generator().manual_seed(1)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    weights = {
        "model.embed_tokens.weight": new(22, 16),
        "model.norm.weight": new(16),
        "lm_head.weight": new(22, 16),
    }
    for layer in range(2):
        stem = f"model.layers.{layer}."
        weights |= {
            stem + "input_layernorm.weight": new(16),
            stem + "self_attn.q_proj.weight": new(16, 16),
            stem + "self_attn.k_proj.weight": new(8, 16),
            stem + "self_attn.v_proj.weight": new(8, 16),
            stem + "self_attn.o_proj.weight": new(16, 16),
            stem + "mlp.gate_proj.weight": new(10, 16),
            stem + "mlp.up_proj.weight": new(10, 16),
            stem + "mlp.down_proj.weight": new(16, 10),
        }
    return weights


def gpt2_weights() -> dict[str, torch.Tensor]:
    """Random float32 weights with the names and shapes of a GPT-2 of `GPT2`."""
    random = torch.Generator().manual_seed(2)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    return {
        "wte.weight": new(22, 24),
        "wpe.weight": new(32, 24),
        "h.0.ln_1.weight": new(24),
        "h.0.attn.c_attn.weight": new(24, 72),
        "h.0.attn.c_attn.bias": new(72),
        "h.0.attn.c_proj.weight": new(24, 24),
        "h.0.attn.c_proj.bias": new(24),
        "h.0.mlp.c_fc.weight": new(24, 96),
        "h.0.mlp.c_fc.bias": new(96),
        "h.0.mlp.c_proj.weight": new(96, 24),
    }


def save_source(
    directory: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], *, shards: int = 1
) -> Path:
    """Save a Hugging Face directory, by safetensors' own writer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@dataclass(frozen=True, slots=True)
class Converted:
    """A checkpoint on disk and its partitions in memory."""

    directory: Path
    manifest: Manifest
    partitions: tuple[bytearray, ...]


def convert_source(source: Path, directory: Path, ranks: int = 1) -> Converted:
    """Convert a directory and read the result whole."""
    directory.mkdir(parents=True)
    with open_source(str(source)) as opened:
        manifest = convert(opened, directory, lambda done, total: None, ranks=ranks)
    files = [directory / partition.file for partition in manifest.partitions]
    return Converted(directory, manifest, tuple(bytearray(file.read_bytes()) for file in files))
