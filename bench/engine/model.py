"""The random Llamas that generation is measured on: bfloat16, seeded, of SmolLM's shapes.

Of SmolLM-135M's shape (30 layers, width 576, 9 heads, 3 of keys and values, tied embeddings), and
of SmolLM-360M's (32 layers, width 960, 15 heads, 5 of keys and values).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source
from gearfall.core.generation.canary import canary_bytes
from services.store.models.canary_process import CanaryRequest
from services.store.models.canary_reference import compute_canary

VOCABULARY = 49152
CONTEXT_TOKENS = 2048
CANARY_FILE = "bench-canary.json"
_SEED = 135


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells these models apart."""

    width: int
    inner_width: int
    layers: int
    heads: int
    kv_heads: int


LLAMA_135M = Shape(576, 1536, 30, 9, 3)
LLAMA_360M = Shape(960, 2560, 32, 15, 5)


def write_model(directory: Path, shape: Shape = LLAMA_135M) -> tuple[Path, Path]:
    """Return the Hugging Face directory and the converted one, written once."""
    directory = directory.resolve()
    source, converted = directory / "source", directory / "converted"
    if not converted.exists():
        if source.exists():
            shutil.rmtree(source)
        _random_llama(shape).save_pretrained(source)
        convert_model(source, converted)
    return source, converted


def convert_model(source: Path, converted: Path) -> None:
    """Convert a Hugging Face directory, with the canary that an engine must answer."""
    incoming = converted.with_name("incoming")
    if incoming.exists():
        shutil.rmtree(incoming)
    incoming.mkdir(parents=True)
    with open_source(str(source)) as opened:
        manifest = convert(opened, incoming, lambda _done, _total: None)
    facts = manifest.model
    request = CanaryRequest(
        str(source), facts.vocabulary_size, facts.bos_token_id, facts.context_tokens
    )
    (incoming / CANARY_FILE).write_bytes(canary_bytes(compute_canary(request)))
    incoming.rename(converted)


def _random_llama(shape: Shape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.inner_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
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
