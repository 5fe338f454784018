"""convert, inspect, verify and export as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from gearfall.cli.main import app
from gearfall.core.errors import Conflict, CorruptCheckpoint, GearfallError, InvalidRequest
from tests.gearfall.checkpoint.conversions import LLAMA, llama_weights, save_source


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.output)
    return document


def refusal(*arguments: object) -> GearfallError:
    result = run(*arguments)
    assert isinstance(result.exception, GearfallError)
    return result.exception


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(tmp_path / "source", llama_weights(), LLAMA, shards=2)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_there_and_back(source: Path, tmp_path: Path):
    converted, out = tmp_path / "converted", tmp_path / "out"
    said = run_json("convert", source, converted, "--ranks", 2)
    assert (said["kind"], said["ranks"]) == ("model", 2)
    shown = run_json("inspect", converted)
    assert shown["digest"] == said["digest"]
    assert shown["model"]["architecture"] == "LlamaForCausalLM"
    assert [partition["chunks"] for partition in shown["partitions"]] == [1, 1]
    assert len(shown["tensors"]) == said["tensors"]
    verified = run_json("verify", converted)
    assert (verified["sound"], verified["damages"]) == (True, [])
    exported = run_json("export", converted, out)
    assert {file["name"] for file in exported["files"]} == contents(source).keys()
    assert contents(out) == contents(source)
    assert {entry.name for entry in tmp_path.iterdir()} == {"source", "converted", "out"}


def test_people_see_tables(source: Path, tmp_path: Path):
    converted = tmp_path / "converted"
    assert "digest" in run("convert", source, converted, "--ranks", 2).output
    shown = run("inspect", converted).output
    for text in ("LlamaForCausalLM", "partition-1.bin", "split along 1", "whole in each"):
        assert text in shown
    assert "sound" in run("verify", converted).output
    assert "model-00001-of-00002.safetensors" in run("export", converted, tmp_path / "out").output


def test_verify_names_the_damage_and_exits_with_1(source: Path, tmp_path: Path):
    converted = tmp_path / "converted"
    run("convert", source, converted)
    partition = converted / "partition-0.bin"
    content = bytearray(partition.read_bytes())
    content[100] ^= 1
    partition.write_bytes(content)
    result = run("verify", converted)
    assert result.exit_code == 1
    assert "partition-0.bin chunk 0" in result.output
    result = run("verify", converted, "--json")
    assert result.exit_code == 1
    (damage,) = json.loads(result.output)["damages"]
    assert (damage["file"], damage["chunk"]) == ("partition-0.bin", 0)
    assert isinstance(refusal("export", converted, tmp_path / "out"), CorruptCheckpoint)
    assert not (tmp_path / "out").exists()


def test_an_adapter_needs_its_base(source: Path, tmp_path: Path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    run("convert", source, base)
    adapter.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.v_proj"
    factors = {
        f"{stem}.lora_A.weight": torch.ones(2, 16),
        f"{stem}.lora_B.weight": torch.ones(8, 2),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "--base" in refusal("convert", adapter, tmp_path / "lora").message
    said = run_json("convert", adapter, tmp_path / "lora", "--base", base)
    assert said["kind"] == "adapter"
    shown = run_json("inspect", tmp_path / "lora")
    assert shown["adapter"]["base_digest"] == run_json("inspect", base)["digest"]
    assert "LoRA adapter of" in run("inspect", tmp_path / "lora").output
    run("export", tmp_path / "lora", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(adapter)


KILLED = """
import os, sys
from gearfall.cli import convert
from gearfall.cli.main import main

def kill_in_the_middle(source, directory, report, *, ranks):
    def report_and_die(done_bytes, total_bytes):
        if 2 * done_bytes > total_bytes:
            os.kill(os.getpid(), 9)
    return convert_source(source, directory, report_and_die, ranks=ranks)

convert_source, convert.convert_source = convert.convert_source, kill_in_the_middle
main()
"""


def test_a_killed_conversion_leaves_no_checkpoint(source: Path, tmp_path: Path):
    command = [sys.executable, "-c", KILLED, "convert", str(source), str(tmp_path / "new")]
    killed = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "new").exists()
    assert run_json("convert", source, tmp_path / "new")["kind"] == "model"
    assert run_json("verify", tmp_path / "new")["sound"]


def test_what_is_refused(source: Path, tmp_path: Path):
    converted = tmp_path / "converted"
    run("convert", source, converted)
    assert isinstance(refusal("convert", source, converted), Conflict)
    assert isinstance(refusal("export", converted, converted), Conflict)
    assert isinstance(refusal("convert", source, tmp_path / "none/deep"), InvalidRequest)
    assert isinstance(refusal("convert", tmp_path, tmp_path / "new"), InvalidRequest)
    assert isinstance(refusal("convert", source, tmp_path / "new", "--ranks", 9), InvalidRequest)
    for command in ("inspect", "verify"):
        assert isinstance(refusal(command, source), InvalidRequest)
        assert isinstance(refusal(command, tmp_path / "none"), InvalidRequest)
    assert not (tmp_path / "new").exists()
