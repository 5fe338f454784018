"""The rules by name: they fit real families, and ranks together compute what the whole does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from gearfall.checkpoint.rank_tensors import rank_tensors
from gearfall.checkpoint.tensor_parallel import find_splits
from gearfall.core.checkpoint.manifest import ModelFacts
from gearfall.core.checkpoint.safetensors_header import SourceTensor
from tests.gearfall.checkpoint.conversions import Converted, convert_source
from tests.services.worker.tiny_checkpoints import CONFIGS, random_model

RANKS = 2
LAYER = 1


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp(request.param)
    model = random_model(request.param, dtype=torch.float32)
    model.save_pretrained(home / "source")
    return model, home / "source", convert_source(home / "source", home / "converted", RANKS)


def test_every_family_is_cut_and_whole_again(family: tuple[PreTrainedModel, Path, Converted]):
    _, source, converted = family
    whole = load_file(source / "model.safetensors")
    found = rank_tensors(converted.manifest, converted.partitions, 0, 1)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name


def test_of_every_layer_all_matrices_are_shared(family: tuple[PreTrainedModel, Path, Converted]):
    _, _, converted = family
    for tensor in converted.manifest.tensors:
        is_matrix = ".0." in tensor.name and len(tensor.full_shape) == 2
        assert not is_matrix or tensor.split is not None, tensor.name


def rank_module(module: nn.Module, stem: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Put a rank's tensors into a module that was made for a rank."""
    weights = {name.removeprefix(stem): t for name, t in tensors.items() if name.startswith(stem)}
    module.load_state_dict(weights)
    return module


def shrunk(config: Any) -> Any:
    """The config of one rank's part of a layer."""
    values = config.to_dict()
    values["head_dim"] = config.hidden_size // config.num_attention_heads
    if getattr(config, "head_dim", None):
        values["head_dim"] = config.head_dim
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        values[field] //= RANKS
    part = type(config)(**values)
    part._attn_implementation = "eager"
    return part


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "gemma2", "mistral"])
@torch.no_grad()
def test_the_sum_of_ranks_is_the_whole_layer(name: str, tmp_path: Path):
    model: Any = random_model(name, dtype=torch.float32)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path / "source")
    converted = convert_source(tmp_path / "source", tmp_path / "converted", RANKS)
    layer = model.model.layers[LAYER]
    hidden = torch.randn(1, 5, model.config.hidden_size)
    places = torch.arange(5).unsqueeze(0)
    cos_sin = model.model.rotary_emb(hidden, places)

    def attend(module: nn.Module) -> torch.Tensor:
        answer: torch.Tensor = module(hidden, position_embeddings=cos_sin, attention_mask=None)[0]
        return answer

    parts: list[tuple[str, Callable[[nn.Module], torch.Tensor]]] = [
        ("self_attn", attend),
        ("mlp", lambda module: module(hidden)),
    ]
    for part, forward in parts:
        whole = getattr(layer, part)
        stem = f"model.layers.{LAYER}.{part}."
        total = torch.zeros_like(hidden)
        for rank in range(RANKS):
            tensors = rank_tensors(converted.manifest, converted.partitions, rank, RANKS)
            config = shrunk(model.config)
            arguments = (config, LAYER) if part == "self_attn" else (config,)
            total += forward(rank_module(type(whole)(*arguments).eval(), stem, tensors))
        assert torch.allclose(total, forward(whole), rtol=1e-4, atol=1e-4), part


FACTS = ModelFacts("LlamaForCausalLM", 1, 1, 1, None, (), "float32", 1, 2, 4, False)


@pytest.mark.parametrize(
    ("name", "shape", "obstacle"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (12, 8), "does not fit"),
        ("model.layers.0.self_attn.k_proj.weight", (16, 8), "does not fit"),
        ("model.layers.0.self_attn.qkv_proj.weight", (8, 8), "does not fit"),
        ("model.layers.0.self_attn.o_proj.weight", (8,), "does not fit"),
        ("model.layers.0.mlp.gate_up_proj.weight", (7, 8), "does not fit"),
        ("model.layers.0.mlp.up_proj.weight", (0, 8), "does not fit"),
        ("model.layers.0.mlp.up_proj.weight", (7, 8), ""),
        ("model.layers.0.self_attn.q_norm.weight", (7,), ""),
    ],
)
def test_shapes_that_contradict_the_config(name: str, shape: tuple[int, ...], obstacle: str):
    rules = find_splits(FACTS, [SourceTensor(name, "float32", shape, 0, 0)])
    assert obstacle in rules.obstacle
    assert bool(rules.obstacle) == bool(obstacle)
    assert not (rules.obstacle and rules.splits)
