"""Any local Hugging Face causal LM directory is served: the same tokens as transformers' own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gearfall.client import AsyncClient
from gearfall.demo import catalogue

PROMPT = "123+45="
TOKENS = 24


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=18, n_positions=128, n_embd=64, n_layer=2, n_head=4,
            bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=18, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=18, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=9,
            max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=18, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
            num_attention_heads=4, word_embed_proj_dim=64, max_position_embeddings=128,
            bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [gpt2, qwen2, gemma3, opt], ids=lambda make: make.__name__)
async def test_a_random_model_gives_transformers_own_tokens(
    client: AsyncClient, tmp_path: Path, make: Callable[[], PreTrainedModel]
) -> None:
    torch.manual_seed(3)
    model = make().eval()
    # Wide logits, so that no rounding decides between two tokens.
    model.get_output_embeddings().weight.data.mul_(40)
    model.save_pretrained(tmp_path)
    tokenizer = catalogue.checkpoint_path("arith-small") / "tokenizer.json"
    shutil.copy(tokenizer, tmp_path)
    name = f"random-{make.__name__}"
    _ = [item async for item in client.register_model(name, str(tmp_path))]
    prompt_ids = [3, 4, 5, 6, 7]
    answer = await client.generate(
        name, prompt_ids, temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=True
    )
    expected = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids)),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids = [item.token_id for item in answer.choices[0].logprobs]
    assert ids == expected[0, len(prompt_ids) :].tolist()
