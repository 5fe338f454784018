"""What configs of different families say, and those that are refused."""

from typing import Any

import pytest

from gearfall.checkpoint.model_facts import read_facts
from gearfall.core.checkpoint.safetensors_header import SourceTensor
from gearfall.core.errors import InvalidRequest
from tests.services.store.source_directories import CONFIG

TENSORS = [
    SourceTensor("a", "bfloat16", (4, 8), 0, 64),
    SourceTensor("b", "float32", (3,), 64, 12),
]
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}


def test_llama_facts():
    facts = read_facts(CONFIG, {}, TENSORS, has_chat_template=True)
    assert facts.architecture == "LlamaForCausalLM"
    assert (facts.parameters, facts.dtype) == (35, "bfloat16")
    assert (facts.context_tokens, facts.vocabulary_size, facts.layers) == (64, 16, 2)
    assert (facts.kv_heads, facts.head_dim) == (1, 4)
    assert (facts.bos_token_id, facts.eos_token_ids) == (0, (1,))
    assert facts.has_chat_template


def test_gpt2_facts():
    facts = read_facts(GPT2, {}, TENSORS, has_chat_template=False)
    assert (facts.context_tokens, facts.layers) == (1024, 12)
    assert (facts.kv_heads, facts.head_dim) == (12, 64)


def test_an_explicit_head_size_and_multi_query_are_believed():
    config = CONFIG | {"head_dim": 32, "num_key_value_heads": None, "multi_query": True}
    facts = read_facts(config, {}, TENSORS, has_chat_template=False)
    assert (facts.kv_heads, facts.head_dim) == (1, 32)


def test_the_generation_config_has_the_last_word_on_tokens():
    generation = {"eos_token_id": [5, 6], "bos_token_id": None}
    facts = read_facts(CONFIG, generation, TENSORS, has_chat_template=False)
    assert (facts.bos_token_id, facts.eos_token_ids) == (0, (5, 6))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": None}, "architecture"),
        ({"architectures": []}, "architecture"),
        ({"architectures": ["BertModel"]}, "causal"),
        ({"architectures": ["../ForCausalLM"]}, "causal"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"vocab_size": "16"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 9}, "heads than width"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [1] * 1000}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
    ],
)
def test_what_cannot_be_served_is_refused(change: dict[str, Any], complaint: str):
    with pytest.raises(InvalidRequest, match=complaint):
        read_facts(CONFIG | change, {}, TENSORS, has_chat_template=False)
