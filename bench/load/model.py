"""Writes the random Llamas that loading is measured on: many small tensors, bfloat16, seeded."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1024, 2816, 16, 4, 64, 32_000
CONTEXT_TOKENS = 1024
_BLOCK_ELEMENTS = 1 << 25
_SEED = 20_25

Shapes = dict[str, tuple[int, ...]]


def write_llama(directory: Path, size_bytes: int) -> int:
    """Write config.json and model.safetensors of about `size_bytes`; return the file's bytes.

    One block of random weights is cut at another place for each tensor, so that no two are equal
    and writing costs the disk's time only. Written next to its place and renamed: it is whole.
    """
    shapes = llama_shapes(size_bytes)
    incoming = directory.with_name(f"{directory.name}.incoming")
    incoming.mkdir(parents=True, exist_ok=True)
    (incoming / "config.json").write_text(json.dumps(_config(shapes), indent=2))
    with (incoming / "model.safetensors").open("wb") as file:
        header = _header(shapes)
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in _tensors(shapes):
            file.write(tensor.data)
        written = file.tell()
    incoming.rename(directory)
    return written


def llama_shapes(size_bytes: int) -> Shapes:
    """Return the tensors of a Llama of about `size_bytes`, in file order; at least one layer."""
    layer: Shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    outer_bytes = 2 * 2 * VOCABULARY * WIDTH
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(1, round((size_bytes - outer_bytes) / layer_bytes))
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def _config(shapes: Shapes) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": sum("q_proj" in name for name in shapes),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT_TOKENS,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _header(shapes: Shapes) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def _tensors(shapes: Shapes) -> Iterator["np.ndarray[tuple[int, ...], np.dtype[np.uint16]]"]:
    random = np.random.default_rng(_SEED)
    wide = random.standard_normal(_BLOCK_ELEMENTS, dtype=np.float32) * np.float32(0.02)
    block = np.tile((wide.view(np.uint32) >> 16).astype(np.uint16), 2)
    for number, shape in enumerate(shapes.values()):
        count = int(np.prod(shape))
        if len(shape) == 1:
            one = np.full(count, 0x3F80, np.uint16)  # 1.0
            one[number % count] += number % 64  # equal tensors would be stored once
            yield one
        else:
            start = number * 4_099 % (_BLOCK_ELEMENTS - 1)
            assert count <= _BLOCK_ELEMENTS
            yield block[start : start + count]
