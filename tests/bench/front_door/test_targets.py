"""What runs in the front-door bench: everything real but the engine."""

from pathlib import Path

from bench.front_door.instant_engine import TOKEN_VARIABLE
from bench.front_door.k6 import TOKEN
from bench.front_door.targets import instant_commands
from bench.front_door.tiny_checkpoint import CONTEXT_TOKENS, write_tiny_checkpoint
from gearfall.checkpoint.source import open_source
from gearfall.demo.tokenizer import VOCABULARY, build_tokenizer
from gearfall.infra.local.launcher import LocalClusterSettings, service_commands


def test_only_the_worker_is_replaced(tmp_path: Path) -> None:
    settings = LocalClusterSettings(tmp_path, tmp_path)
    real = [spec for stage in service_commands(settings) for spec in stage]
    ours = [spec for stage in instant_commands(settings) for spec in stage]
    assert [spec.service for spec in ours] == [spec.service for spec in real]
    for before, after in zip(real, ours, strict=True):
        if before.service == "worker":
            changed = [part for part in after.argv if part not in before.argv]
            assert changed == ["bench.front_door.instant_worker"]
            assert after.environment[TOKEN_VARIABLE] == str(VOCABULARY[TOKEN])
        else:
            assert after == before


def test_the_engines_token_reads_as_the_load_expects() -> None:
    assert build_tokenizer().decode([VOCABULARY[TOKEN]] * 3) == TOKEN * 3


def test_the_store_takes_the_tiny_checkpoint(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "tiny")
    with open_source(str(tmp_path / "tiny")) as source:
        assert source.facts.context_tokens == CONTEXT_TOKENS
        assert source.facts.has_chat_template
        assert source.facts.vocabulary_size == len(VOCABULARY)
