"""Every family's engine gives the answer that transformers' own pass recorded, and only then."""

import numpy as np
import pytest
import torch

from gearfall.core.errors import CorruptCheckpoint
from gearfall.core.generation.canary import parse_canary
from services.store.models.canary_process import CanaryRequest
from services.store.models.canary_reference import compute_canary
from services.worker.engine.model.engine_model import build_model
from services.worker.engine.model.ops import NativeOps
from services.worker.engine.starting.canary import run_canary
from tests.services.worker.tiny_checkpoints import CONFIGS, random_model, tiny_checkpoint

FLIPPED_BIT = 0x40
"""In the high byte of a bfloat16: the exponent's second bit."""


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    with tiny_checkpoint(random_model(request.param), directory) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    with tiny_checkpoint(random_model("llama"), tmp_path_factory.mktemp("llama")) as checkpoint:
        yield checkpoint


def build(checkpoint, mappings=None):
    return build_model(
        checkpoint.manifest,
        mappings or checkpoint.map(),
        checkpoint.config_json,
        ops=NativeOps(1),
        device=torch.device("cpu"),
        kv_blocks=2,
    )


def test_the_recorded_answer_is_given(family):
    canary = parse_canary(family.canary_json)
    run_canary(build(family), canary)
    assert any(token.margin > token.tolerance for token in canary.answer)


def test_source_and_checkpoint_have_the_same_canary(family):
    """So it may be computed again from the checkpoint where the source is gone."""
    facts = family.manifest.model
    again = compute_canary(
        CanaryRequest(
            str(family.directory.parent / "converted"),
            facts.vocabulary_size,
            facts.bos_token_id,
            facts.context_tokens,
        )
    )
    assert again == parse_canary(family.canary_json)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_flipped_weight_is_found(llama, name):
    """One exponent bit of one weight, as a checksum that was made after the flip can't see it."""
    canary = parse_canary(llama.canary_json)
    entry = llama.manifest.tensors_by_name()[name]
    mappings = llama.map()
    row = canary.prompt_token_ids[0] if name == "model.embed_tokens.weight" else 0
    place = entry.offset_bytes + 2 * entry.shape[-1] * row + 1
    mappings[entry.partition][place] ^= FLIPPED_BIT
    with pytest.raises(CorruptCheckpoint, match=r"canary failed|not numbers"):
        run_canary(build(llama, mappings), canary)


def test_a_canary_of_another_vocabulary_is_refused(llama):
    class Small:
        vocabulary_size = 3

        def forward(self, step):
            return np.zeros((len(step.logit_rows), 3), np.float32)

    with pytest.raises(CorruptCheckpoint, match="vocabulary"):
        run_canary(Small(), parse_canary(llama.canary_json))
