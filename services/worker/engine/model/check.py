"""Trial of a model of an unproven family: gearfall's forward pass against transformers' own."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Chunk, Sequence
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.batching.packing import PackedStep, pack_step
from services.worker.engine.model.engine_model import EngineModel

PROVEN = frozenset(
    {
        "Cohere2ForCausalLM",
        "CohereForCausalLM",
        "GPT2LMHeadModel",
        "GPTBigCodeForCausalLM",
        "GPTNeoXForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "Glm4ForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "NemotronForCausalLM",
        "OPTForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "OlmoForCausalLM",
        "Phi3ForCausalLM",
        "PhiForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
        "StableLmForCausalLM",
        "Starcoder2ForCausalLM",
    }
)
"""Architectures whose equality the test suite shows; they start without a trial."""

TOLERANCE = 1e-3
"""Most difference of logits, relative to their spread, that float32 sums in another order make."""


def try_unproven(model: EngineModel, architecture: str) -> None:
    """Refuse an unproven architecture whose packed, paged pass differs from transformers' own.

    Two sequences are computed in one row and in chunks, so what mixes tokens across sequences or
    forgets between chunks shows. Raises InvalidRequest.
    """
    if architecture in PROVEN:
        return
    prompts = [_prompt(11, model.vocabulary_size), _prompt(7, model.vocabulary_size)]
    for prompt, paged in zip(prompts, _paged_logits(model, prompts), strict=True):
        own = model.reference_logits(prompt)
        if np.abs(paged - own).max() > TOLERANCE * max(float(np.ptp(own)), 1.0):
            raise InvalidRequest(f"{architecture} is not served: its paged logits are not its own")


def _prompt(tokens: int, vocabulary_size: int) -> list[int]:
    return [(7 * place + tokens) % vocabulary_size for place in range(tokens)]


def _paged_logits(model: EngineModel, prompts: list[list[int]]) -> list[NDArray[np.float32]]:
    """Logits of each prompt's last token, computed side by side in two chunks each."""
    blocks = KvBlocks(len(prompts))
    sequences = []
    for number, prompt in enumerate(prompts):
        sequence = Sequence(
            JobId(str(number)), Epoch(1), prompt, len(prompt), SamplingParams(max_tokens=1)
        )
        blocks.extend(sequence.key, len(prompt))
        sequences.append(sequence)
    first = [Chunk(sequence, 0, 4) for sequence in sequences]
    rest = [Chunk(sequence, 4, len(sequence.tokens) - 4) for sequence in sequences]
    model.forward(_exact(pack_step(first, blocks)))
    return list(model.forward(_exact(pack_step(rest, blocks))))


def _exact(step: PackedStep) -> PackedStep:
    return dataclasses.replace(step, exact_tokens=len(step.token_ids))
