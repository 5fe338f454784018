"""Small Hugging Face directories for the store's tests, written byte by byte."""

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

from gearfall.core.checkpoint.dtypes import DTYPE_BYTES, DTYPE_OF_SAFETENSORS

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def random_tensor(
    shape: tuple[int, ...], *, dtype: str = "BF16", seed: int = 0
) -> tuple[str, tuple[int, ...], bytes]:
    """Return (dtype, shape, bytes) with random bytes."""
    size = math.prod(shape) * DTYPE_BYTES[DTYPE_OF_SAFETENSORS[dtype]]
    return dtype, shape, random.Random(f"{seed}{shape}{dtype}").randbytes(size)


def llama_tensors(seed: int = 0) -> Tensors:
    """Return a few tensors with the names of a Llama checkpoint, in safetensors' order."""
    names = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.mlp.up_proj.weight" for i in (10, 0, 2)),
        "model.norm.weight",
    ]
    return {name: random_tensor((16, 8), seed=hash((seed, i))) for i, name in enumerate(names)}


def safetensors_bytes(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """Return a whole safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(body), len(body) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def write_source(
    directory: Path,
    tensors: Tensors | None = None,
    *,
    config: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a directory with one safetensors file, config and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    content = safetensors_bytes(llama_tensors() if tensors is None else tensors, metadata)
    (directory / "model.safetensors").write_bytes(content)
    (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


def write_sharded(directory: Path, shards: dict[str, Tensors]) -> Path:
    """Write a directory with an index and several safetensors files."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        (directory / file).write_bytes(safetensors_bytes(tensors))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory
