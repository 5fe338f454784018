"""Writes the checkpoint that the front-door bench registers: real files, next to no weights."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gearfall.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCABULARY, save_tokenizer

CONTEXT_TOKENS = 256
WIDTH = 32


def write_tiny_checkpoint(directory: Path) -> None:
    """Write a one-layer Llama with zero weights and the demo's tokenizer into `directory`."""
    directory.mkdir(parents=True)
    save_tokenizer(directory, max_tokens=CONTEXT_TOKENS)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": WIDTH,
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": CONTEXT_TOKENS,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_tensors(), directory / "model.safetensors", metadata={"format": "pt"})


def _tensors() -> dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]:
    layer = "model.layers.0"
    squares = [f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"]
    squares += [f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    norms = [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(VOCABULARY), WIDTH),
        **dict.fromkeys(squares, (WIDTH, WIDTH)),
        **dict.fromkeys([*norms, "model.norm.weight"], (WIDTH,)),
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
