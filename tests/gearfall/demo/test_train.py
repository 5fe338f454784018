"""Training: what counts in the loss, how the rate moves, and that a checkpoint can be loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM

from gearfall.demo.arithmetic import ask
from gearfall.demo.family import SIZES
from gearfall.demo.muon import Muon, orthogonalise
from gearfall.demo.progress import Progress
from gearfall.demo.tokenizer import EOS_ID, PAD_ID, build_tokenizer
from gearfall.demo.train import (
    IGNORED,
    build_model,
    collate,
    learning_rate_factor,
    main,
    train,
    train_family,
)


def test_only_the_answer_and_its_end_are_learnt() -> None:
    batch = collate([ask(9, "+", 8), ask(12, "-", 345)])
    learnt = [[int(i) for i in row if i != IGNORED] for row in batch.labels]
    ids = build_tokenizer().encode_batch(["17", "-333"], add_special_tokens=False)
    assert learnt == [[*encoding.ids, EOS_ID] for encoding in ids]
    assert batch.tokens[0, -1] == PAD_ID
    assert torch.equal(batch.tokens[batch.labels != IGNORED], batch.labels[batch.labels != IGNORED])


@given(steps=st.integers(1, 300))
def test_the_learning_rate_rises_then_falls(steps: int) -> None:
    factors = [learning_rate_factor(step, steps) for step in range(steps)]
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("shape", [(2, 32, 48), (2, 48, 32), (1, 32, 32)])
def test_orthogonalise_levels_the_singular_values(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(shape, generator=generator)
    values = torch.linalg.svdvals(orthogonalise(stack))
    assert values.shape == (shape[0], min(shape[1:]))
    assert float(values.min()) > 0.2
    assert float(values.max()) < 1.3


def test_muon_lowers_a_loss() -> None:
    matrix = torch.nn.Parameter(torch.eye(4))
    muon = Muon([matrix], lr=0.05)
    losses = []
    for _ in range(5):
        loss = (matrix - 1.0).square().sum()
        matrix.grad = None
        torch.autograd.backward(loss)
        muon.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_muon_needs_gradients() -> None:
    with pytest.raises(ValueError, match="gradient"):
        Muon([torch.nn.Parameter(torch.eye(2))], lr=0.1).step()


@pytest.mark.parametrize("name", SIZES)
def test_a_size_states_its_parameters(name: str) -> None:
    size = SIZES[name]
    model: Any = build_model(size)
    embedding = model.get_input_embeddings().weight
    assert size.body_parameters == sum(p.numel() for p in model.parameters()) - embedding.numel()
    assert size.width == size.heads * model.config.head_dim


def test_training_repeats_itself() -> None:
    small = SIZES["arith-small"]
    seen: list[list[Progress]] = [[], []]
    models = [train(small, seed=7, steps=3, progress=steps.append) for steps in seen]
    assert [p.loss for p in seen[0]] == [p.loss for p in seen[1]]
    assert [p.step for p in seen[0]] == [1, 2, 3]
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, two)


def test_a_quick_training_learns_and_can_be_loaded(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--sizes", "arith-small", "--quick", "--threads", "1"])
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert lines[0].startswith("seed=0 threads=1 ")
    assert lines[-1].startswith("arith-small step=20/20 ")
    checkpoint = tmp_path / "arith-small"
    model: Any = LlamaForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == EOS_ID
    prompt = AutoTokenizer.from_pretrained(checkpoint)("1+2=", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2).shape[1] > prompt["input_ids"].shape[1]


def test_an_unknown_size_is_refused_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="arith-huge"):
        train_family(tmp_path, sizes=["arith-small", "arith-huge"])
    assert not list(tmp_path.iterdir())
