"""A companion is larger in every direction and says what its original says."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from bench.cascade.companions import write_companion
from gearfall.demo.catalogue import checkpoint_path

ORIGINAL = checkpoint_path("arith-small")


def loaded(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize(("width", "layers"), [(1, 2), (4, 2)])
def test_a_companion_computes_more_and_answers_alike(tmp_path, width, layers):
    write_companion(ORIGINAL, tmp_path / "grown", width=width, layers=layers)
    small, grown = loaded(ORIGINAL), loaded(tmp_path / "grown")
    kept = grown.model.layers[-1].mlp.gate_proj.weight
    assert len(grown.model.layers) == layers * len(small.model.layers)
    assert kept.shape == tuple(width * n for n in small.model.layers[-1].mlp.gate_proj.weight.shape)
    assert kept.count_nonzero() == kept.numel(), "what is multiplied is not all zeros"
    tokens = torch.randint(4, 17, (8, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = small(tokens).logits, grown(tokens).logits
    assert expected.std() > 1.0, "there is something to tell apart"
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_companion_is_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        write_companion(ORIGINAL, tmp_path / name, layers=2)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "tokenizer.json").exists()
