"""Families served exactly: the packed, paged pass equals transformers' own float32 pass."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gearfall.core.checkpoint.manifest import AdapterFacts
from gearfall.core.errors import CorruptCheckpoint, GearfallError, InvalidRequest
from gearfall.core.generation.canary import parse_canary
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch, Sequence
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.batching.packing import pack_step
from services.worker.engine.engine import Engine
from services.worker.engine.model.check import PROVEN, try_unproven
from services.worker.engine.model.engine_model import build_model
from services.worker.engine.model.ops import NativeOps, TorchOps
from services.worker.engine.starting.canary import run_canary
from services.worker.engine_link.messages import SubmitJob
from tests.services.worker.tiny_checkpoints import (
    CONFIGS,
    REFUSED,
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
ANSWER_TOKENS = 12


TORCH_FAMILIES = ("gemma3", "gpt2", "llama", "mistral", "opt")
"""Also computed by plain torch, whose kernels know the same things."""


@pytest.fixture(
    scope="module",
    params=[*((family, "native") for family in CONFIGS), *((f, "torch") for f in TORCH_FAMILIES)],
    ids="-".join,
)
def case(request):
    return request.param


@pytest.fixture
def ops(case):
    return NativeOps(2) if case[1] == "native" else TorchOps()


@pytest.fixture(scope="module")
def checkpoint(case, tmp_path_factory):
    with tiny_checkpoint(random_model(case[0]), tmp_path_factory.mktemp("family")) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def reference(checkpoint):
    return checkpoint.reference()


@pytest.fixture(scope="module")
def answers_of_reference(reference):
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(ANSWER_TOKENS):
            tokens.append(int(logits_of(reference, tokens).argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def build(checkpoint, ops, config_json=None):
    return build_model(
        checkpoint.manifest,
        checkpoint.map(),
        checkpoint.config_json if config_json is None else config_json,
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
        found: dict[str, Any] = {}
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


def test_greedy_tokens_equal_transformers(checkpoint, answers_of_reference, ops):
    engine = Engine(
        build(checkpoint, ops),
        Batch(KvBlocks(BLOCKS), slots=8, step_tokens=16),
        context_tokens=checkpoint.manifest.model.context_tokens,
    )
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(SubmitJob(JobId(str(number)), Epoch(1), tuple(prompt), (), sampling))
    answers: dict[str, list[int]] = {str(number): [] for number in range(len(PROMPTS))}
    while not engine.is_idle:
        for run in engine.step().runs:
            answers[run.job_id] += run.token_ids
    assert list(answers.values()) == answers_of_reference
    assert len(set(map(tuple, answers_of_reference))) > 1


def test_canary_and_trial_pass(checkpoint, ops):
    model = build(checkpoint, ops)
    run_canary(model, parse_canary(checkpoint.canary_json))
    try_unproven(model, "NeverProven")


def _one_token():
    blocks = KvBlocks(1)
    batch = Batch(blocks, slots=1, step_tokens=1)
    batch.submit(Sequence(JobId("a"), Epoch(1), [1], 1, SamplingParams(max_tokens=1)))
    return pack_step(batch.plan_step(), blocks)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    with tiny_checkpoint(random_model("llama"), tmp_path_factory.mktemp("llama")) as checkpoint:
        yield checkpoint


def test_weights_are_views_of_the_mapping(llama):
    mappings = llama.map()
    model = build_model(
        llama.manifest,
        mappings,
        llama.config_json,
        ops=TorchOps(),
        device=torch.device("cpu"),
        kv_blocks=2,
    )
    before = model.reference_logits([1, 2, 3])
    entry = llama.manifest.tensors_by_name()["lm_head.weight"]
    end = entry.offset_bytes + entry.size_bytes
    mappings[entry.partition][entry.offset_bytes : end] = bytes(entry.size_bytes)
    assert before.any()
    assert not model.reference_logits([1, 2, 3]).any()


def test_a_step_without_logits_gives_none(llama):
    model = build(llama, TorchOps())
    batch = Batch(KvBlocks(BLOCKS), slots=1, step_tokens=4)
    batch.submit(Sequence(JobId("a"), Epoch(1), list(range(9)), 9, SamplingParams(max_tokens=1)))
    logits = model.forward(pack_step(batch.plan_step(), batch.blocks))
    assert logits.shape == (0, VOCABULARY)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model_type": "no_such"}, InvalidRequest, "model_type"),
        ({"model_type": ["llama"]}, InvalidRequest, "model_type"),
        ({"model_type": "bert"}, InvalidRequest, "causal"),
        ({"num_hidden_layers": 4}, CorruptCheckpoint, "lacks"),
        ({"num_hidden_layers": 2}, CorruptCheckpoint, "no place"),
        ({"vocab_size": 68}, CorruptCheckpoint, "shape"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, InvalidRequest, "quantised"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            InvalidRequest,
            "rotary",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(llama, change, error, text):
    config = json.dumps(json.loads(llama.config_json) | change).encode()
    with pytest.raises(error, match=text):
        build(llama, TorchOps(), config_json=config)


@pytest.mark.parametrize("config_json", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"a": 1}'])
def test_hostile_config_is_refused(llama, config_json):
    with pytest.raises(GearfallError):
        build(llama, TorchOps(), config_json=config_json)


def test_a_trial_that_fails_refuses_the_model(llama):
    model = build(llama, _WrongOps())
    model.forward(_one_token())
    with pytest.raises(InvalidRequest, match="NeverProven"):
        try_unproven(model, "NeverProven")


class _WrongOps(TorchOps):
    def attend(self, q, cache, layout, spec):
        return super().attend(q, cache, layout, spec) * 1.1


@pytest.mark.parametrize("family", CONFIGS)
def test_native_results_do_not_hang_on_the_batch(family: str, tmp_path: Path):
    """Bit for bit: alone, beside others, whole and in chunks."""
    with tiny_checkpoint(random_model(family), tmp_path) as checkpoint:
        model = build(checkpoint, NativeOps(2))
    found = []
    for step_tokens, companions in ((128, 0), (128, 5), (3, 2), (5, 4)):
        batch = Batch(KvBlocks(BLOCKS), slots=8, step_tokens=step_tokens)
        sampling = SamplingParams(max_tokens=1)
        batch.submit(Sequence(JobId("a"), Epoch(1), list(PROMPTS[0]), 19, sampling))
        for number in range(companions):
            tokens = [number + 3] * (4 * number + 1)
            batch.submit(Sequence(JobId(str(number)), Epoch(1), tokens, 1, sampling))
        while (chunks := batch.plan_step())[0].sequence.job_id == "a" or batch.running > 0:
            rows = iter(model.forward(pack_step(chunks, batch.blocks)))
            for chunk in chunks:
                batch.commit(chunk)
                row = next(rows) if chunk.samples else None
                if row is not None:
                    batch.remove(chunk.sequence.key)
                    if chunk.sequence.job_id == "a":
                        found.append(row)
            if not batch.running and not batch.waiting:
                break
    assert len(found) == 4
    for other in found[1:]:
        assert (other == found[0]).all()


def test_every_proven_family_is_in_this_suite():
    kinds = {getattr(transformers, kind).model_type for kind, _ in CONFIGS.values()}
    names = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind in kinds}
    assert names == PROVEN


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_can_not_be_served_exactly_is_refused(family: str, tmp_path: Path):
    with (
        tiny_checkpoint(random_model(family), tmp_path) as checkpoint,
        pytest.raises(InvalidRequest, match=REFUSED[family][2]),
    ):
        build(checkpoint, NativeOps(1)).forward(_one_token())


@pytest.mark.parametrize("family", ["llama-tied", "phi3", "gpt2", "gpt_neox", "opt"])
def test_a_checkpoint_cut_for_ranks_is_served_by_one_engine(family: str, tmp_path: Path):
    model = random_model(family)
    logits = []
    for ranks in (1, 2):
        with tiny_checkpoint(model, tmp_path, ranks=ranks) as checkpoint:
            assert checkpoint.manifest.ranks == ranks
            logits.append(build(checkpoint, TorchOps()).reference_logits(PROMPTS[0]))
    assert np.array_equal(*logits)


def test_an_adapter_is_no_model(llama, tmp_path: Path):
    facts = AdapterFacts("0" * 32, 1, 1.0, is_rank_stabilised=False)
    manifest = replace(llama.manifest, adapter=facts)
    with pytest.raises(InvalidRequest, match="adapter"):
        build(replace(llama, manifest=manifest), TorchOps())
