"""A block's bytes are found where a strided array has them, and no two overlap."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine_link.kv_layout import KvLayer, KvLayout

TOKENS = 4
BLOCKS = 3


def layout_of(*row_bytes):
    """Layers whose tokens have so many bytes each, one array after the other."""
    layers, end = [], 0
    for row in row_bytes:
        block = TOKENS * row
        layers.append(KvLayer(end, end + BLOCKS * block, block))
        end += 2 * BLOCKS * block
    return KvLayout(BLOCKS, TOKENS, end, tuple(layers))


def test_all_blocks_cover_the_memory_once():
    layout = layout_of(2, 3)
    found = sorted(
        place
        for block in range(BLOCKS)
        for part in layout.ranges(block)
        for place in range(part.offset, part.offset + part.size_bytes)
    )
    assert found == list(range(layout.size_bytes))
    assert layout.block_bytes * BLOCKS == layout.size_bytes
    assert layout.token_bytes * TOKENS == layout.block_bytes


@given(row=st.integers(1, 5), block=st.integers(0, BLOCKS - 1), tokens=st.integers(0, TOKENS))
def test_a_part_of_a_block_is_its_first_tokens(row, block, tokens):
    layout = layout_of(row)
    memory = np.arange(layout.size_bytes)
    keys, values = memory.reshape(2, BLOCKS, TOKENS, row)
    parts = [
        memory[part.offset : part.offset + part.size_bytes].tolist()
        for part in layout.ranges(block, tokens)
    ]
    assert parts == [keys[block, :tokens].ravel().tolist(), values[block, :tokens].ravel().tolist()]
