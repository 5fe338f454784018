"""Engine and worker see the same blocks, layer by layer, through one descriptor."""

import os
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import Internal
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS
from services.worker.engine.kv_memory import EngineKvMemory
from services.worker.engine_link.kv_memory import KvMemory


def open_both(total_blocks, heads_and_sizes):
    """Return the layers' tensors and the worker's view of the same memory."""
    engine = EngineKvMemory(total_blocks)
    layers = [engine.add_layer(i, *shape) for i, shape in enumerate(heads_and_sizes)]
    return layers, KvMemory(os.dup(engine.fileno()), engine.layout)


@given(
    total_blocks=st.integers(1, 5),
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3),
    data=st.data(),
)
def test_the_worker_reads_what_the_engine_wrote_and_the_other_way_round(total_blocks, shapes, data):
    layers, worker = open_both(total_blocks, shapes)
    block = data.draw(st.integers(0, total_blocks - 1))
    tokens = data.draw(st.integers(0, BLOCK_TOKENS))
    for number, part in enumerate(part for layer in layers for part in layer):
        part.copy_(torch.arange(part.numel()).view(part.shape) + 1000 * number)
    expected = b"".join(
        part[block, :tokens].numpy().tobytes() for layer in layers for part in layer
    )
    assert worker.read(block, tokens) == expected
    others, target = open_both(total_blocks, shapes)
    target.write(total_blocks - 1 - block, expected, tokens)
    for mine, theirs in zip(layers, others, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(other[total_blocks - 1 - block, :tokens], one[block, :tokens])
            assert not other[total_blocks - 1 - block, tokens:].any()


def test_large_layers_lie_apart():
    layers, worker = open_both(3, [(8, 4096)] * 2)
    for number, part in enumerate(part for layer in layers for part in layer):
        part.fill_(number)
    for number, view in enumerate(worker.views(2)):
        assert set(view.cast("f")[:: BLOCK_TOKENS * 512]) == {float(number)}


def test_what_was_not_written_takes_no_memory():
    engine = EngineKvMemory(3)
    layers = [engine.add_layer(index, 8, 4096) for index in range(4)]
    for part in (part for layer in layers for part in layer):
        part[0, 0] = 1.0  # 128 KiB of 6 MiB
    assert os.fstat(engine.fileno()).st_blocks * 512 < 2 << 20


def test_what_the_worker_writes_takes_no_huge_page():
    engine = EngineKvMemory(3)
    engine.add_layer(0, 8, 4096)
    worker = KvMemory(os.dup(engine.fileno()), engine.layout)
    worker.write(1, b"\1" * engine.layout.token_bytes, 1)  # 256 KiB of 12 MiB
    assert 0 < os.fstat(engine.fileno()).st_blocks * 512 < 2 << 20


def test_blocks_that_the_engine_touched_are_there_and_cost_no_faults():
    engine = EngineKvMemory(4)
    layers = [engine.add_layer(index, 8, 4096) for index in range(2)]
    worker = KvMemory(os.dup(engine.fileno()), engine.layout)
    worker.write(1, b"\1" * engine.layout.block_bytes)
    engine.touch((1, 2))
    assert os.fstat(engine.fileno()).st_blocks * 512 == 2 * engine.layout.block_bytes
    assert faults_of(lambda: [part[1:3].sum() for layer in layers for part in layer]) < 20
    assert faults_of(lambda: [part[0].sum() for layer in layers for part in layer]) > 100


def faults_of(act):
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    act()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_content_of_another_length_is_refused():
    _, worker = open_both(2, [(1, 4)])
    with pytest.raises(Internal, match="not as long"):
        worker.write(0, b"123")


def test_memory_that_is_too_short_is_refused():
    engine = EngineKvMemory(2)
    engine.add_layer(0, 1, 4)
    os.ftruncate(engine.fileno(), 4096)
    with pytest.raises(Internal, match="can't be mapped"):
        KvMemory(os.dup(engine.fileno()), engine.layout)


def test_views_outlive_the_engine():
    layers, worker = open_both(1, [(1, 2)])
    layers[0][0].fill_(7.0)
    (keys, _) = worker.views(0)
    del layers, worker
    assert keys.cast("f")[3] == 7.0
