"""The random Llama that generation is measured on: about 135M parameters, bfloat16, seeded.

Of SmolLM-135M's shape (30 layers, width 576, 9 heads, 3 of keys and values, tied embeddings).
"""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source
from gearfall.core.canary import canary_bytes
from services.store.canary_process import CanaryRequest
from services.store.canary_reference import compute_canary

VOCABULARY = 49152
CONTEXT_TOKENS = 2048
CANARY_FILE = "bench-canary.json"
_SEED = 135


def write_model(directory: Path) -> tuple[Path, Path]:
    """Return the Hugging Face directory and the converted one, written once."""
    directory = directory.resolve()
    source, converted = directory / "source", directory / "converted"
    if not converted.exists():
        incoming = directory / "incoming"
        for stale in (source, incoming):
            if stale.exists():
                shutil.rmtree(stale)
        incoming.mkdir(parents=True)
        _random_llama().save_pretrained(source)
        with open_source(str(source)) as opened:
            manifest = convert(opened, incoming, lambda _done, _total: None)
        facts = manifest.model
        request = CanaryRequest(
            str(source), facts.vocabulary_size, facts.bos_token_id, facts.context_tokens
        )
        (incoming / CANARY_FILE).write_bytes(canary_bytes(compute_canary(request)))
        incoming.rename(converted)
    return source, converted


def _random_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for layer in model.model.layers:  # far enough from zero that answers wander
                for name, weight in layer.named_parameters():
                    if name.endswith("proj.weight"):
                        weight.normal_(0.0, 0.08)
    stored: LlamaForCausalLM = model.bfloat16()
    return stored
