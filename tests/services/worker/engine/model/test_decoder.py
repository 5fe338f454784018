"""The native pass: the bits of the stand-ins one by one, for every step."""

import numpy as np
import pytest
import torch

from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch, Sequence
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.batching.packing import pack_step
from services.worker.engine.model.engine_model import build_model
from services.worker.engine.model.ops import NativeOps, TorchOps
from services.worker.engine.model.rotary import RotaryTable
from tests.services.worker.tiny_checkpoints import random_model, tiny_checkpoint

FAMILIES = (
    *("llama", "llama-tied", "llama3-rope", "mistral", "qwen2", "qwen3"),
    *("phi3", "gemma", "gemma2", "gemma3", "gemma3-mixed", "gpt2", "gpt2-scaled", "opt"),
)
BLOCKS = 64
PROMPTS = (list(range(1, 41)), [3], [17, 50, 6, 6, 6, 29, 55], [5, 9, 1, 33] * 6)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    with tiny_checkpoint(random_model(request.param), directory) as checkpoint:
        yield checkpoint


def build(checkpoint, ops):
    return build_model(
        checkpoint.manifest,
        checkpoint.map(),
        checkpoint.config_json,
        ops=ops,
        device=torch.device("cpu"),
        kv_blocks=BLOCKS,
    )


def greedy_logits(model, *, is_native: bool, step_tokens: int) -> dict[str, list[np.ndarray]]:
    """Logits of each job's rows while all run to 8 greedy tokens."""
    batch = Batch(KvBlocks(BLOCKS), slots=8, step_tokens=step_tokens)
    for number, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(max_tokens=8)
        batch.submit(Sequence(JobId(str(number)), Epoch(1), list(prompt), len(prompt), sampling))
    rows: dict[str, list[np.ndarray]] = {str(number): [] for number in range(len(PROMPTS))}
    native = model.native
    model.native = native if is_native else None
    while batch.running or batch.waiting:
        chunks = batch.plan_step()
        logits = iter(model.forward(pack_step(chunks, batch.blocks)))
        for chunk in chunks:
            batch.commit(chunk)
            if chunk.samples:
                job = rows[chunk.sequence.job_id]
                job.append(next(logits))
                batch.append(chunk.sequence, int(job[-1].argmax()))
                if len(job) == 8:
                    batch.remove(chunk.sequence.key)
    model.native = native
    return rows


def first_step(model) -> None:
    batch = Batch(KvBlocks(1), slots=1, step_tokens=1)
    batch.submit(Sequence(JobId("a"), Epoch(1), [1], 1, SamplingParams(max_tokens=1)))
    model.forward(pack_step(batch.plan_step(), batch.blocks))


@pytest.mark.parametrize(
    ("step_tokens", "arithmetic"),
    [(128, Arithmetic.EXACT), (9, Arithmetic.EXACT), (9, Arithmetic.BF16)],
)
def test_the_native_pass_has_the_bits_of_the_stand_ins(checkpoint, step_tokens, arithmetic):
    model = build(checkpoint, NativeOps(3))
    assert model.use(arithmetic) == arithmetic.value
    at_first = model.native
    first_step(model)
    assert at_first is None
    assert model.native is not None
    one_by_one = greedy_logits(model, is_native=False, step_tokens=step_tokens)
    before = dict(model.native.seconds())
    native = greedy_logits(model, is_native=True, step_tokens=step_tokens)
    assert all(spent > before[phase] for phase, spent in model.native.seconds().items())
    for job, rows in one_by_one.items():
        assert np.array_equal(np.array(rows).view(np.int32), np.array(native[job]).view(np.int32))
    assert len({tuple(np.argmax(rows, axis=1)) for rows in native.values()}) > 1


def test_other_kinds_and_devices_have_none(tmp_path):
    for number, (family, ops) in enumerate(
        [
            ("gpt_neox", NativeOps(1)),
            ("olmo2", NativeOps(1)),
            ("llama", TorchOps()),
        ]
    ):
        directory = tmp_path / str(number)
        with tiny_checkpoint(random_model(family), directory) as checkpoint:
            model = build(checkpoint, ops)
            first_step(model)
            assert model.native is None


def test_a_rotary_table_gives_what_it_stands_for_and_keeps_it():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    inner = LlamaRotaryEmbedding(LlamaConfig(hidden_size=40, num_attention_heads=4))
    table = RotaryTable(inner)
    x = torch.zeros(1, 3, 40)
    ids = torch.tensor([[0, 5, 1023]])
    for got, want in zip(table(x, ids), inner(x, ids), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    early = table.table(1)[0].clone()
    assert table.table(3000)[0].shape[0] == 3072
    assert torch.equal(table.table(1)[0][:1024], early)
    far = torch.tensor([[2999]])
    torch.testing.assert_close(table(x, far)[1], inner(x, far)[1], rtol=0, atol=1e-6)
