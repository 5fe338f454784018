"""A model of 200 MB is built over its mapping: nothing copied, nothing initialised twice."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from gearfall.core.generation.canary import Canary, CanaryToken
from services.worker.engine.model.engine_model import build_model
from services.worker.engine.model.ops import NativeOps
from services.worker.engine.starting.canary import run_canary
from tests.services.worker.tiny_checkpoints import hold_in_memory

SIZE_BYTES = 150 * 2**20
CANARY = Canary((1, 5), (CanaryToken(0, 0.0, 0.0, 1e6),))
"""Any answer will do: the weights are next to zeros."""


def write_model(directory: Path, *, tied: bool) -> None:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = dict(model.named_parameters())
    tensors = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in names.items()}
    for number, tensor in enumerate(tensors.values()):  # equal tensors would be stored once
        tensor.view(-1)[0] = number
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_dict()))


def anonymous_bytes() -> int:
    """Memory of this process that no file or memfd stands behind, copies on write included."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous line in smaps_rollup")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory / "source", tied=request.param)
    with hold_in_memory(directory / "source", directory / "converted") as checkpoint:
        yield checkpoint


def test_every_weight_is_a_view_and_memory_does_not_grow(checkpoint):
    assert checkpoint.manifest.size_bytes > SIZE_BYTES
    (mapping,) = checkpoint.map()
    start = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
    before = anonymous_bytes()
    model = build_model(
        checkpoint.manifest,
        [mapping],
        checkpoint.config_json,
        ops=NativeOps(2),
        device=torch.device("cpu"),
        kv_blocks=2,
    )
    built = anonymous_bytes()
    run_canary(model, CANARY)
    ran = anonymous_bytes()
    parameters = dict(model._model.named_parameters(remove_duplicate=False))
    inside = {n for n, p in parameters.items() if 0 <= p.data_ptr() - start < len(mapping)}
    outside = [p for n, p in parameters.items() if n not in inside]
    # Norms are widened to float32: a few KiB a layer.
    assert sum(p.nbytes for p in outside) <= 13 * 1024 * 4
    assert all(p.dim() == 1 for p in outside)
    assert built - before < 8 * 2**20
    assert ran - before < 24 * 2**20


def test_tied_weights_are_the_same_memory(checkpoint):
    config = json.loads(checkpoint.config_json)
    model = build_model(
        checkpoint.manifest,
        checkpoint.map(),
        checkpoint.config_json,
        ops=NativeOps(2),
        device=torch.device("cpu"),
        kv_blocks=2,
    )._model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embedding, head = parameters["model.embed_tokens.weight"], parameters["lm_head.weight"]
    assert (embedding.data_ptr() == head.data_ptr()) is config["tie_word_embeddings"]


def test_a_models_cache_ends_with_the_model(checkpoint):
    model = build_model(
        checkpoint.manifest,
        checkpoint.map(),
        checkpoint.config_json,
        ops=NativeOps(1),
        device=torch.device("cpu"),
        kv_blocks=2,
    )
    run_canary(model, CANARY)
    memory = weakref.ref(model.kv_memory)
    assert memory() is not None
    del model
    gc.collect()
    assert memory() is None
