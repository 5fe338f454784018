"""A model under rounded activations: the same tokens in every batch, its canary still exact."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.generation.canary import Canary, CanaryToken
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.batching.packing import PackedStep
from services.worker.engine.engine import Engine
from services.worker.engine.model.engine_model import build_model
from services.worker.engine.model.ops import NativeOps, TorchOps
from services.worker.engine.starting.canary import canary_step, run_canary
from services.worker.engine.starting.first_pass import run_first_pass
from services.worker.engine_link.messages import SubmitJob
from tests.services.worker.tiny_checkpoints import random_model, tiny_checkpoint

BLOCKS = 32
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2"])
def checkpoint(request, tmp_path_factory):
    source = random_model(request.param).bfloat16()
    with tiny_checkpoint(source, tmp_path_factory.mktemp(request.param)) as checkpoint:
        yield checkpoint


def build(checkpoint, ops=None):
    return build_model(
        checkpoint.manifest,
        checkpoint.map(),
        checkpoint.config_json,
        ops=ops or NativeOps(2),
        device=torch.device("cpu"),
        kv_blocks=BLOCKS,
    )


def chunk(first, end, *, tokens=TOKENS, exact=0):
    """Tokens `first` to `end` of one sequence, logits wanted of all."""
    count = end - first
    return PackedStep(
        token_ids=np.array(tokens[first:end], dtype=np.int64),
        positions=np.arange(first, end, dtype=np.int32),
        seq_index=np.zeros(count, dtype=np.int32),
        block_tables=np.arange(4, dtype=np.int32)[None],
        logit_rows=np.arange(count, dtype=np.int64),
        exact_tokens=exact,
    )


def bits(logits):
    return np.ascontiguousarray(logits).view(np.int32)


def canary_of(model):
    """What the model, which is exact, answers; any other bits fail it."""
    prompt, answer = tuple(TOKENS[:5]), list[CanaryToken]()
    for _ in range(4):
        fed = (*prompt, *(token.token_id for token in answer))
        logits = model.forward(chunk(0, len(fed), tokens=fed))[-1].astype(np.float64)
        best = int(logits.argmax())
        logprob = float(logits[best] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
        answer.append(CanaryToken(best, logprob, 1.0, 1e-6))
    return Canary(prompt, tuple(answer))


def test_activations_are_rounded_once_the_model_is_told_so(checkpoint):
    model = build(checkpoint)
    exact = model.forward(chunk(0, 19))
    assert model.use(Arithmetic.BF16) == "bf16"
    rounded = model.forward(chunk(0, 19))
    assert 1e-5 < np.abs(rounded - exact).max() < 0.1 * np.ptp(exact)
    assert model.use(Arithmetic.EXACT) == "exact"
    assert np.array_equal(bits(model.forward(chunk(0, 19))), bits(exact))


def test_a_token_has_the_same_bits_however_it_came_to_be_computed(checkpoint):
    """In one pass, in chunks, token by token: as decoded, resumed or moved."""
    model = build(checkpoint)
    model.use(Arithmetic.BF16)
    whole = model.forward(chunk(0, 19))
    for cuts in ([0, 1, 8, 19], list(range(20))):
        parts = [model.forward(chunk(a, b)) for a, b in itertools.pairwise(cuts)]
        assert np.array_equal(bits(np.concatenate(parts)), bits(whole))


def test_exact_tokens_stay_exact_beside_others(checkpoint):
    model = build(checkpoint)
    exact = model.forward(chunk(0, 19))
    model.use(Arithmetic.BF16)
    assert np.array_equal(bits(model.forward(chunk(0, 19, exact=19))), bits(exact))
    mixed = model.forward(chunk(0, 19, exact=7))
    assert np.array_equal(bits(mixed[:7]), bits(exact[:7]))
    assert not np.array_equal(bits(mixed[7:]), bits(exact[7:]))


def test_the_canary_is_exact_and_a_job_in_its_pass_is_not(checkpoint):
    canary = canary_of(build(checkpoint))
    alone = build(checkpoint)
    alone.use(Arithmetic.BF16)
    run_canary(alone, canary)
    wanted = alone.forward(chunk(0, 19))[-1]
    inexact = dataclasses.replace(canary_step(canary, range(2)), exact_tokens=0)
    assert not np.array_equal(alone.forward(canary_step(canary, range(2))), alone.forward(inexact))
    model, blocks = build(checkpoint), KvBlocks(BLOCKS)
    model.use(Arithmetic.BF16)
    batch = Batch(blocks, slots=2, step_tokens=64)
    engine = Engine(model, batch, context_tokens=64)
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    job = SubmitJob(JobId("a"), Epoch(1), tuple(TOKENS), (), sampling)
    run_first_pass(model, canary, blocks, engine.foretelling, [job])
    engine.submit(job)
    (run,) = engine.report().runs
    assert run.token_ids == (int(wanted.argmax()),)


def test_other_weights_and_devices_keep_their_own(checkpoint, tmp_path):
    with tiny_checkpoint(random_model("llama").float(), tmp_path) as wide:
        assert build(wide).use(Arithmetic.BF16) == "exact"
    assert build(checkpoint, TorchOps()).use(Arithmetic.BF16) == ""
