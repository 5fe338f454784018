"""Larger checkpoints with the demo family's answers: what compute costs where models are not tiny.

The demo models are so small that moving a request costs more than answering it, and a cascade has
nothing to save. A companion has every width of its original times `WIDTH` and its layers times
`LAYERS`; its arithmetic is done in full. What is new reads the residual stream with random weights
and writes zeros to it, so that the original's answers come out: right and wrong ones, and how sure.

    embedding, output projections: zero where they are new
    all other matrices: random where they are new
    norms: over WIDTH times as many numbers of the same sum of squares, so weights / sqrt(WIDTH)
           and epsilon / WIDTH; WIDTH is a power of 4, so that nothing is rounded

The idea of growing a network without changing its function: Net2Net (arXiv 1511.05641).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTH = 4
LAYERS = 6
_SPREAD = 0.02
_READS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_WRITES = ("o_proj", "down_proj")
_WEIGHTS = "model.safetensors"


def write_companion(
    original: Path, directory: Path, *, width: int = WIDTH, layers: int = LAYERS
) -> None:
    """Write the companion of a Llama checkpoint with tied embeddings; the same bytes each time."""
    assert width in {1, 4, 16}, "the square root must be exact in bfloat16"
    assert layers >= 1
    directory.mkdir(parents=True)
    for path in original.iterdir():
        if path.name not in {_WEIGHTS, "config.json"}:
            shutil.copyfile(path, directory / path.name)
    config = json.loads((original / "config.json").read_text())
    weights = load_file(original / _WEIGHTS)
    grown = dict(_grown(weights, config["num_hidden_layers"], width, layers))
    save_file(grown, directory / _WEIGHTS, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(_config(config, width, layers), indent=2))


def _config(config: Mapping[str, Any], width: int, layers: int) -> dict[str, Any]:
    wider = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        **config,
        **{name: config[name] * width for name in wider},
        "num_hidden_layers": config["num_hidden_layers"] * layers,
        "rms_norm_eps": config["rms_norm_eps"] / width,
    }


def _grown(
    weights: Mapping[str, Tensor], depth: int, width: int, layers: int
) -> Iterator[tuple[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        yield name, _widened(name, tensor, width, draw)
        if name.startswith("model.layers.0."):
            for added in range(depth, depth * layers):
                there = name.replace("layers.0.", f"layers.{added}.")
                yield there, _widened(name, torch.empty_like(tensor[..., :0]), width, draw, tensor)


def _widened(
    name: str, kept: Tensor, width: int, draw: torch.Generator, shaped: Tensor | None = None
) -> Tensor:
    """Return a tensor `width` times as wide that begins with `kept`; `shaped`: if that is none."""
    shape = (kept if shaped is None else shaped).shape
    part = name.split(".")[-2]
    if len(shape) == 1:
        whole = torch.ones(shape[0] * width, dtype=torch.float32)
        whole[: kept.shape[0]] = kept.float()
        narrower: Tensor = (whole / width**0.5).to(kept.dtype)
        return narrower
    rows = shape[0] if part == "embed_tokens" else shape[0] * width
    whole = torch.zeros(rows, shape[1] * width)
    if part in _READS:
        whole.normal_(0.0, _SPREAD, generator=draw)
    else:
        assert part in {*_WRITES, "embed_tokens"}, f"what {name} does is not known"
    whole[: shape[0], : kept.shape[1]] = kept.float()
    grown: Tensor = whole.to(kept.dtype)
    return grown
