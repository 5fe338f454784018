"""The pass beside the steps: the bits of a step, on a thread that gives way."""

import contextlib
import os
import threading

import numpy as np
import pytest
import torch

from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch, Sequence
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.batching.packing import PackedStep, pack_step
from services.worker.engine.batching.sequence import Chunk
from services.worker.engine.model.ops import NativeOps, TorchOps
from services.worker.engine.model.side_pass import NICENESS
from tests.services.worker.engine.model.test_decoder import build, first_step
from tests.services.worker.tiny_checkpoints import random_model, tiny_checkpoint

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with tiny_checkpoint(random_model("llama"), tmp_path_factory.mktemp("llama")) as found:
        yield found


def filled_cache(checkpoint, *, is_beside: bool) -> np.ndarray:
    """Keys and values of all layers after 40 tokens were computed in three chunks."""
    model = build(checkpoint, NativeOps(2))
    model.use(Arithmetic.BF16)
    first_step(model)
    blocks = KvBlocks(8)
    tokens = [place % 50 for place in range(41)]
    sequence = Sequence(JobId("a"), Epoch(1), tokens, 41, SamplingParams(max_tokens=1))
    batch = Batch(blocks, slots=1, step_tokens=64)
    batch.submit(sequence)
    batch.plan_step()
    side_pass = model.side_pass()
    for start, end in ((0, 16), (16, 23), (23, 40)):
        step = pack_step([Chunk(sequence, start, end - start)], blocks)
        if is_beside:
            side_pass.begin(step)
            assert side_pass.wait(LIMIT_S) > 0
        else:
            model.forward(step)
    side_pass.close()
    layers = sorted(model._cache.layers.items())
    caches = [each for _, (cache, _) in layers for each in (cache.keys, cache.values)]
    table = torch.tensor(blocks.table(sequence.key))
    return torch.stack([cache[table].flatten(0, 1)[:40] for cache in caches]).numpy()


def one_token(token: int) -> PackedStep:
    blocks = KvBlocks(2)
    sequence = Sequence(JobId("a"), Epoch(1), [token, 1], 2, SamplingParams(max_tokens=1))
    blocks.extend(sequence.key, 2)
    return pack_step([Chunk(sequence, 0, 1)], blocks)


def test_what_it_computes_has_the_bits_of_a_step(checkpoint):
    beside = filled_cache(checkpoint, is_beside=True)
    in_steps = filled_cache(checkpoint, is_beside=False)
    assert np.array_equal(beside.view(np.int32), in_steps.view(np.int32))
    assert np.abs(beside).max() > 0


def test_steps_and_passes_at_the_same_time_leave_each_other_s_bits_alone(checkpoint):
    model = build(checkpoint, NativeOps(2))
    model.use(Arithmetic.BF16)
    first_step(model)
    blocks = KvBlocks(48)
    held, running = (
        Sequence(JobId(name), Epoch(1), [7] * 300, 300, SamplingParams(max_tokens=1))
        for name in "hr"
    )
    for each in (held, running):
        blocks.extend(each.key, 300)
    passes = [
        pack_step([Chunk(held, start, 64)], blocks) for start in (0, 64, 128, 192) for _ in range(5)
    ]
    step = pack_step([Chunk(running, 0, 300)], blocks)
    alone = model.forward(step)
    with contextlib.closing(model.side_pass()) as side_pass:
        for chunk_pass in passes:
            side_pass.begin(chunk_pass)
            steps = 0
            while side_pass.wait(0.0) is None or steps == 0:
                assert np.array_equal(model.forward(step), alone)
                steps += 1
    [keys, *_] = [cache.keys for cache, _ in model._cache.layers.values()]
    of_held, of_running = (
        keys[torch.tensor(blocks.table(each.key))].flatten(0, 1)[:256] for each in (held, running)
    )
    assert torch.equal(of_held, of_running), "the same tokens at the same places"
    assert alone.any()


def test_its_thread_gives_way_and_the_caller_s_does_not(checkpoint):
    model = build(checkpoint, NativeOps(1))
    first_step(model)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with contextlib.closing(model.side_pass()) as side_pass:
        side_pass.begin(one_token(1))
        assert side_pass.wait(LIMIT_S) is not None
        [thread] = [each for each in threading.enumerate() if each.name == "side-pass"]
        assert thread.native_id is not None
        its_own = os.getpriority(os.PRIO_PROCESS, thread.native_id)
    assert its_own == min(19, before + NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    assert not thread.is_alive()


def test_what_the_pass_raises_the_caller_gets(checkpoint):
    model = build(checkpoint, NativeOps(1))
    first_step(model)
    with contextlib.closing(model.side_pass()) as side_pass:
        side_pass.begin(one_token(10**6))
        with pytest.raises(ValueError, match="token"):
            side_pass.wait(LIMIT_S)


def test_blocks_are_touched_before_what_is_computed_next(checkpoint):
    model = build(checkpoint, NativeOps(1))
    first_step(model)
    before = stored_bytes(model)
    with contextlib.closing(model.side_pass()) as side_pass:
        side_pass.touch(tuple(range(32)))
        side_pass.begin(one_token(1))
        assert side_pass.wait(LIMIT_S) is not None
    assert stored_bytes(model) > before


def stored_bytes(model) -> int:
    return os.fstat(model.kv_memory.fileno()).st_blocks * 512


def test_what_a_touch_raises_the_caller_gets(checkpoint):
    model = build(checkpoint, NativeOps(1))
    first_step(model)
    with contextlib.closing(model.side_pass()) as side_pass:
        side_pass.touch((10**6,))
        side_pass.begin(one_token(1))
        with pytest.raises(IndexError, match="out of range"):
            side_pass.wait(LIMIT_S)


def test_a_model_without_a_native_pass_has_none(checkpoint):
    model = build(checkpoint, TorchOps())
    first_step(model)
    assert model.side_pass() is None
