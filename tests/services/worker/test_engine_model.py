"""Families served exactly: the packed, paged pass equals transformers' own float32 pass."""

import json

import numpy as np
import pytest
import torch

from gearfall.core.errors import CorruptCheckpoint, GearfallError, InvalidRequest
from gearfall.core.ids import Epoch, JobId
from gearfall.core.sampling import SamplingParams
from services.worker.batch import Batch, Sequence
from services.worker.engine import Engine
from services.worker.engine_check import try_unproven
from services.worker.engine_messages import SubmitJob
from services.worker.engine_model import build_model
from services.worker.engine_ops import NativeOps, TorchOps
from services.worker.kv_blocks import KvBlocks
from services.worker.packing import pack_step
from tests.services.worker.tiny_checkpoints import (
    CONFIGS,
    VOCABULARY,
    random_model,
    tiny_checkpoint,
)

PROMPTS = [
    [5, 9, 1, 33, 20, 4, 4, 60, 18, 2, 11, 40, 41, 42, 7, 8, 30, 31, 12],
    [3],
    [17, 50, 6, 6, 6, 29, 55],
    list(range(1, 41)),
]
BLOCKS = 64


@pytest.fixture(params=["native", "torch"])
def ops(request):
    return NativeOps(2) if request.param == "native" else TorchOps()


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    with tiny_checkpoint(random_model(request.param), directory) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def reference(checkpoint):
    return checkpoint.reference()


def build(checkpoint, ops, manifest=None, config_json=None):
    return build_model(
        manifest or checkpoint.manifest,
        checkpoint.map(),
        config_json or checkpoint.config_json,
        ops=ops,
        device=torch.device("cpu"),
        kv_blocks=BLOCKS,
    )


def logits_of(reference, tokens):
    with torch.no_grad():
        return reference(input_ids=torch.tensor([tokens])).logits[0, -1].numpy()


def test_last_logits_equal_transformers_in_one_packed_step_and_in_chunks(
    checkpoint, reference, ops
):
    model = build(checkpoint, ops)
    for step_tokens in (128, 7):
        batch = Batch(KvBlocks(BLOCKS), slots=8, step_tokens=step_tokens)
        for number, prompt in enumerate(PROMPTS):
            sampling = SamplingParams(max_tokens=1)
            batch.submit(
                Sequence(JobId(str(number)), Epoch(1), list(prompt), len(prompt), sampling)
            )
        found = {}
        while len(found) < len(PROMPTS):
            chunks = batch.plan_step()
            rows = iter(model.forward(pack_step(chunks, batch.blocks)))
            for chunk in chunks:
                batch.commit(chunk)
                if chunk.samples:
                    found[chunk.sequence.job_id] = next(rows)
                    batch.remove(chunk.sequence.key)
        for number, prompt in enumerate(PROMPTS):
            own = logits_of(reference, prompt)
            assert np.abs(found[str(number)] - own).max() < 1e-4


def test_greedy_tokens_equal_transformers(checkpoint, reference, ops):
    engine = Engine(
        build(checkpoint, ops),
        Batch(KvBlocks(BLOCKS), slots=8, step_tokens=16),
        context_tokens=checkpoint.manifest.model.context_tokens,
    )
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(SubmitJob(JobId(str(number)), Epoch(1), tuple(prompt), (), sampling))
    answers = {str(number): [] for number in range(len(PROMPTS))}
    while not engine.is_idle:
        for run in engine.step().runs:
            answers[run.job_id] += run.token_ids
    for number, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for _ in range(24):
            tokens.append(int(logits_of(reference, tokens).argmax()))
        assert answers[str(number)] == tokens[len(prompt) :]
    assert len({tuple(answer) for answer in answers.values()}) > 1


def test_the_trial_passes(checkpoint, ops):
    model = build(checkpoint, ops)
    model.forward(_one_token())
    try_unproven(model, "NeverProven")


def _one_token():
    blocks = KvBlocks(1)
    batch = Batch(blocks, slots=1, step_tokens=1)
    batch.submit(Sequence(JobId("a"), Epoch(1), [1], 1, SamplingParams(max_tokens=1)))
    return pack_step(batch.plan_step(), blocks)
