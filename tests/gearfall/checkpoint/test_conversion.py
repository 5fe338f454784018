"""What a conversion writes for several ranks, refuses, and takes in memory."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gearfall.core.checkpoint.manifest import manifest_bytes
from gearfall.core.errors import InvalidRequest
from tests.gearfall.checkpoint.conversions import (
    GPT2,
    LLAMA,
    convert_source,
    gpt2_weights,
    llama_weights,
    save_source,
)
from tests.services.store.source_directories import CONFIG, random_tensor, write_source


def test_ranks_hold_their_part_and_small_wholes(tmp_path: Path):
    large = random_tensor((600, 1000), dtype="BF16")
    tensors = {"model.layers.0.mlp.up_proj.weight": random_tensor((6, 4)), "whole": large}
    source = write_source(tmp_path / "source", tensors | {"model.norm.weight": random_tensor((4,))})
    manifest = convert_source(source, tmp_path / "converted", 2).manifest
    entries = manifest.entries_by_name()
    assert [e.shape for e in entries["model.layers.0.mlp.up_proj.weight"]] == [(3, 4), (3, 4)]
    assert [e.partition for e in entries["model.norm.weight"]] == [0, 1]
    assert [e.partition for e in entries["whole"]] == [0]
    assert manifest.partitions[1].size_bytes == 4096


def test_ties_are_stored_once_for_each_rank(tmp_path: Path):
    weights = llama_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    source = save_source(tmp_path / "source", weights, LLAMA)
    manifest = convert_source(source, tmp_path / "converted", 2).manifest
    (alias,) = manifest.aliases
    assert {alias.name, alias.target} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert len(manifest.entries_by_name()["lm_head.weight"]) == 2


def test_the_same_source_gives_the_same_bytes(tmp_path: Path):
    source = save_source(tmp_path / "source", gpt2_weights(), GPT2)
    one, two = (convert_source(source, tmp_path / name, 3) for name in ("one", "two"))
    assert manifest_bytes(one.manifest) == manifest_bytes(two.manifest)
    assert one.partitions == two.partitions


def test_names_in_parts_are_not_found_as_one(tmp_path: Path):
    source = save_source(tmp_path / "source", llama_weights(), LLAMA)
    with pytest.raises(InvalidRequest, match="2 ranks"):
        convert_source(source, tmp_path / "two", 2).manifest.tensors_by_name()
    assert convert_source(source, tmp_path / "one").manifest.tensors_by_name()


@pytest.mark.parametrize(
    ("config", "ranks", "complaint"),
    [
        (LLAMA, 0, "ranks must be"),
        (LLAMA, 65, "ranks must be"),
        (LLAMA, 5, "indivisible"),
        (LLAMA | {"architectures": ["OwnForCausalLM"]}, 2, "no rules"),
        (LLAMA | {"num_key_value_heads": 4}, 2, "does not fit"),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    tmp_path: Path, config: dict[str, object], ranks: int, complaint: str
):
    source = save_source(tmp_path / "source", llama_weights(), config)
    with pytest.raises(InvalidRequest, match=complaint):
        convert_source(source, tmp_path / "converted", ranks)
    convert_source(source, tmp_path / "whole")


def write_sparse(directory: Path, layers: int) -> int:
    """A Llama of zeros, 24 MiB a layer, that takes no room on disk; return its bytes."""
    directory.mkdir()
    shapes = {}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        shapes[f"{stem}.mlp.down_proj.weight"] = (1024, 4096)
        shapes[f"{stem}.self_attn.o_proj.weight"] = (2048, 2048)
        shapes[f"{stem}.self_attn.q_proj.weight"] = (2048, 2048)
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        # Tensors of zeros would be one another's aliases.
        for number, (begin, _) in enumerate(e["data_offsets"] for e in header.values()):
            os.pwrite(file.fileno(), f"{number:8}".encode(), 8 + len(text) + begin)
    config = CONFIG | {"num_key_value_heads": 4, "num_attention_heads": 16, "head_dim": 128}
    (directory / "config.json").write_text(json.dumps(config))
    return end


MEASURE = """
import json, resource, sys
from pathlib import Path
from typing import Any
from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.export import export
from gearfall.checkpoint.reading import open_checkpoint
from gearfall.checkpoint.source import open_source
from gearfall.checkpoint.verification import verify

def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small, large, home = map(Path, sys.argv[1:])
quiet = lambda done, total: None
peaks = []
for source in (small, large):
    directory, out = home / source.name, home / f"out-{source.name}"
    directory.mkdir(), out.mkdir()
    with open_source(str(source)) as opened:
        convert(opened, directory, quiet, ranks=2)
    peaks.append(peak_kib())
    checkpoint = open_checkpoint(directory)
    verify(checkpoint, quiet).check()
    export(checkpoint, out, quiet)
    peaks.append(peak_kib())
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    """Peaks of one process: after a model of 24 MiB, then after one of 216 MiB."""
    write_sparse(tmp_path / "small", 1)
    size_bytes = write_sparse(tmp_path / "large", 9)
    command = [sys.executable, "-c", MEASURE, *map(str, (tmp_path / "small", tmp_path / "large"))]
    (tmp_path / "home").mkdir()
    result = subprocess.run(
        [*command, str(tmp_path / "home")], check=True, capture_output=True, timeout=90
    )
    before, after_small, converted, exported = json.loads(result.stdout)
    assert size_bytes == 216 * 2**20
    assert converted - after_small < 16 * 1024
    assert exported - after_small < 16 * 1024
    assert after_small - before < 64 * 1024
    source = tmp_path / "large/model.safetensors"
    assert (tmp_path / "home/out-large/model.safetensors").stat().st_size == source.stat().st_size
