"""LoRA adapters: what fits its base becomes a checkpoint, all else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gearfall.checkpoint.adapter_source import alpha_of, is_adapter, open_adapter, read_alphas
from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.export import export
from gearfall.checkpoint.rank_tensors import rank_tensors
from gearfall.checkpoint.reading import open_checkpoint
from gearfall.core.checkpoint.manifest import AdapterFacts, Manifest, manifest_bytes, parse_manifest
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest
from tests.gearfall.checkpoint.conversions import (
    GPT2,
    LLAMA,
    convert_source,
    gpt2_weights,
    llama_weights,
    save_source,
)

DIGEST = "0123456789abcdef" * 2
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 6,
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "fan_in_fan_out": False,
}
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN = "base_model.model.model.layers.1.mlp.down_proj"
Weights = dict[str, torch.Tensor]


def factors() -> Weights:
    return {
        f"{QUERY}.lora_A.weight": torch.randn(3, 16),
        f"{QUERY}.lora_B.weight": torch.randn(16, 3),
        f"{DOWN}.lora_A.weight": torch.randn(3, 10),
        f"{DOWN}.lora_B.weight": torch.randn(16, 3),
    }


def save_adapter(directory: Path, weights: Weights, config: dict[str, Any] = CONFIG) -> Path:
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    home = tmp_path_factory.mktemp("base")
    source = save_source(home / "source", llama_weights(), LLAMA)
    return convert_source(source, home / "converted").manifest


def convert_adapter(
    source: Path, base: Manifest, directory: Path, ranks: int = 1, digest: str = DIGEST
) -> Manifest:
    directory.mkdir()
    with open_adapter(str(source), base, digest) as opened:
        return convert(opened, directory, lambda done, total: None, ranks=ranks)


def test_an_adapter_names_its_base_and_comes_back(tmp_path: Path, base: Manifest):
    source = save_adapter(tmp_path / "adapter", factors(), CONFIG | {"use_rslora": True})
    assert is_adapter(source)
    manifest = convert_adapter(source, base, tmp_path / "converted")
    assert manifest.adapter == AdapterFacts(DIGEST, 3, 6.0, True)
    assert manifest.model.architecture == "LlamaForCausalLM"
    assert (manifest.model.dtype, manifest.model.parameters) == ("float32", 3 * (16 + 16 + 10 + 16))
    (tmp_path / "out").mkdir()
    export(open_checkpoint(tmp_path / "converted"), tmp_path / "out", lambda done, total: None)
    for file in source.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_factors_are_shared_as_the_weights_they_stand_on(tmp_path: Path, base: Manifest):
    weights = factors()
    source = save_adapter(tmp_path / "adapter", weights)
    manifest = convert_adapter(source, base, tmp_path / "converted", ranks=2)
    partitions = [
        bytearray((tmp_path / "converted" / p.file).read_bytes()) for p in manifest.partitions
    ]
    found = rank_tensors(manifest, partitions, 1, 2)
    expected = {
        f"{QUERY}.lora_A.weight": weights[f"{QUERY}.lora_A.weight"],
        f"{QUERY}.lora_B.weight": weights[f"{QUERY}.lora_B.weight"][8:],
        f"{DOWN}.lora_A.weight": weights[f"{DOWN}.lora_A.weight"][:, 5:],
        f"{DOWN}.lora_B.weight": weights[f"{DOWN}.lora_B.weight"],
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_transposed_weights_and_embeddings(tmp_path: Path):
    base_source = save_source(tmp_path / "base", gpt2_weights(), GPT2)
    base = convert_source(base_source, tmp_path / "base-converted").manifest
    stem = "base_model.model.transformer"
    weights = {
        f"{stem}.h.0.attn.c_attn.lora_A.weight": torch.randn(3, 24),
        f"{stem}.h.0.attn.c_attn.lora_B.weight": torch.randn(72, 3),
        f"{stem}.wte.lora_embedding_A": torch.randn(3, 22),
        f"{stem}.wte.lora_embedding_B": torch.randn(24, 3),
    }
    source = save_adapter(tmp_path / "adapter", weights, CONFIG | {"fan_in_fan_out": True})
    assert convert_adapter(source, base, tmp_path / "converted").adapter is not None


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"peft_type": "IA3"}, "not of a LoRA"),
        ({"peft_type": None}, "not of a LoRA"),
        ({"r": 0}, "impossible r"),
        ({"r": 2**40}, "impossible r"),
        ({"r": True}, "impossible r"),
        ({"lora_alpha": "6"}, "impossible lora_alpha"),
        ({"lora_alpha": 2**70}, "impossible lora_alpha"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"auto_mapping": {"parent_library": "evil"}}, "auto_mapping"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "changed its base"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+)+b": 8}}, "alpha_pattern"),
    ],
)
def test_configs_that_are_refused(
    tmp_path: Path, base: Manifest, config: dict[str, Any], complaint: str
):
    source = save_adapter(tmp_path / "adapter", factors(), CONFIG | config)
    with pytest.raises(InvalidRequest, match=complaint):
        convert_adapter(source, base, tmp_path / "converted")


@pytest.mark.parametrize(
    ("module", "alpha"),
    [("layers.1.q_proj", 8.0), ("layers.1.xq_proj", 6.0), ("q_proj", 8.0), ("layers.0.k", 2.0)],
)
def test_a_module_may_have_an_alpha_of_its_own(module: str, alpha: float):
    alphas = read_alphas({"alpha_pattern": {"q_proj": 8, "layers.0.k": 2, "0.k": 3}})
    assert alpha_of(module, 6.0, alphas) == alpha


def lacks_a_factor(weights: Weights) -> None:
    del weights[f"{QUERY}.lora_B.weight"]


def is_of_another_base(weights: Weights) -> None:
    weights[f"{QUERY}.lora_A.weight"] = torch.randn(3, 99)


def ranks_differ(weights: Weights) -> None:
    weights[f"{QUERY}.lora_A.weight"] = torch.randn(4, 16)


def is_no_matrix(weights: Weights) -> None:
    weights[f"{QUERY}.lora_A.weight"] = torch.randn(48)


def has_an_unknown_module(weights: Weights) -> None:
    weights["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.randn(3, 16)


def has_a_whole_weight(weights: Weights) -> None:
    weights["base_model.model.lm_head.weight"] = torch.randn(22, 16)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lacks_a_factor, "don't fit each other"),
        (is_of_another_base, "does not fit the base"),
        (ranks_differ, "don't fit each other"),
        (is_no_matrix, "not a matrix"),
        (has_an_unknown_module, "no weight"),
        (has_a_whole_weight, "no weight"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, base: Manifest, damage: Any, complaint: str):
    weights = factors()
    damage(weights)
    source = save_adapter(tmp_path / "adapter", weights)
    with pytest.raises(InvalidRequest, match=complaint):
        convert_adapter(source, base, tmp_path / "converted")


def test_an_adapter_is_no_base(tmp_path: Path, base: Manifest):
    source = save_adapter(tmp_path / "adapter", factors())
    adapter = convert_adapter(source, base, tmp_path / "converted")
    with pytest.raises(InvalidRequest, match="must be a model"):
        convert_adapter(source, adapter, tmp_path / "again")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_digest", "../"),
        ("base_digest", ""),
        ("rank", 0),
        ("rank", -1),
        ("rank", 2**70),
        ("alpha", "1"),
        ("is_rank_stabilised", 1),
    ],
)
def test_hostile_adapter_facts(tmp_path: Path, base: Manifest, field: str, value: object):
    source = save_adapter(tmp_path / "adapter", factors())
    document = json.loads(manifest_bytes(convert_adapter(source, base, tmp_path / "converted")))
    parse_manifest(json.dumps(document).encode())
    document["adapter"][field] = value
    with pytest.raises(CorruptCheckpoint):
        parse_manifest(json.dumps(document).encode())
