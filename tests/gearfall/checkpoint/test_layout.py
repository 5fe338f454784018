"""Load order and placement."""

from hypothesis import given
from hypothesis import strategies as st

from gearfall.checkpoint.layout import LARGE_TENSOR_BYTES, load_order, place
from gearfall.core.checkpoint.manifest import PAGE_BYTES, TENSOR_ALIGNMENT_BYTES
from gearfall.core.checkpoint.safetensors_header import SourceTensor


def test_layers_come_by_number_between_embeddings_and_head():
    names = [
        "lm_head.weight",
        "model.layers.10.mlp.weight",
        "model.layers.2.mlp.weight",
        "model.layers.2.attn.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
    ]
    assert load_order(names) == [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "model.layers.2.attn.weight",
        "model.layers.2.mlp.weight",
        "model.layers.10.mlp.weight",
        "lm_head.weight",
        "model.norm.weight",
    ]


@given(st.lists(st.integers(0, 3 * LARGE_TENSOR_BYTES), min_size=1, max_size=20))
def test_tensors_are_aligned_apart_and_nearly_dense(sizes: list[int]):
    sources = [SourceTensor(f"t{i}", "uint8", (n,), 0, n) for i, n in enumerate(sizes)]
    entries, size_bytes = place(sources)
    end = 0
    for entry, size in zip(entries, sizes, strict=True):
        assert entry.offset_bytes >= end
        assert entry.offset_bytes % TENSOR_ALIGNMENT_BYTES == 0
        assert size < LARGE_TENSOR_BYTES or entry.offset_bytes % PAGE_BYTES == 0
        end = entry.offset_bytes + size
    assert size_bytes >= end
    assert size_bytes % PAGE_BYTES == 0
    padding = size_bytes - sum(sizes)
    assert padding <= PAGE_BYTES + 256 * len(sizes) + sum(sizes) // 256
