"""Paged attention: right against float64, prefill is decode bit for bit, no index is believed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.infra.kernels import cpu_kernels
from tests.gearfall.infra.tensors import random, same_bits


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The references are small: torch's pool would only wait for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class Cache:
    """A paged cache filled with the keys and values of a few sequences."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor


def paged(seed: int, lengths: list[int], heads: int, size: int, block: int = 4) -> Cache:
    """Blocks of the sequences are scattered over the cache; what nobody wrote is NaN."""
    widest = -(-max(lengths) // block)
    blocks = len(lengths) * widest + 3
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    tables = order[: len(lengths) * widest].reshape(len(lengths), widest).contiguous()
    k = [random(seed + 10 + i, n, heads, size) for i, n in enumerate(lengths)]
    v = [random(seed + 50 + i, n, heads, size) for i, n in enumerate(lengths)]
    k_cache = torch.full((blocks, block, heads, size), math.nan)
    v_cache = torch.full((blocks, block, heads, size), math.nan)
    seq = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    cpu_kernels.write_kv(torch.cat(k), torch.cat(v), k_cache, v_cache, tables, seq, positions)
    return Cache(k, v, k_cache, v_cache, tables)


def attend(cache: Cache, q: torch.Tensor, seq: list[int], positions: list[int], **options):
    return cpu_kernels.paged_attention(
        q,
        cache.k_cache,
        cache.v_cache,
        cache.block_tables,
        torch.tensor(seq, dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int32),
        scale=options.pop("scale", q.shape[2] ** -0.5),
        **options,
    )


def reference(cache: Cache, q: torch.Tensor, seq: int, position: int, window: int, softcap: float):
    """One query token in float64: [Hq, D]."""
    first = max(0, position + 1 - window) if window else 0
    group = q.shape[0] // cache.k_cache.shape[2]
    k = cache.k[seq][first : position + 1].double().repeat_interleave(group, 1)
    v = cache.v[seq][first : position + 1].double().repeat_interleave(group, 1)
    scores = torch.einsum("hd,khd->hk", q.double(), k) * q.shape[1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hk,khd->hd", scores.softmax(-1), v)


@pytest.mark.parametrize("variant", cpu_kernels.variants())
@pytest.mark.parametrize(
    ("heads", "group", "size", "window", "softcap"),
    [
        (1, 1, 32, 0, 0.0),
        (2, 1, 64, 0, 0.0),
        (3, 3, 64, 0, 0.0),
        (2, 4, 20, 0, 0.0),
        (1, 30, 16, 0, 0.0),
        (2, 2, 48, 5, 0.0),
        (2, 2, 48, 0, 3.0),
        (1, 2, 112, 7, 1.5),
    ],
)
def test_attention_is_the_float64_softmax(variant, heads, group, size, window, softcap):
    cache = paged(7, [40, 9, 75], heads, size)
    seq, positions = [0] * 20 + [1] + [2] * 6, [*range(20, 40), 8, 0, 1, 2, 3, 73, 74]
    q = 3 * random(3, len(seq), heads * group, size)
    got = attend(cache, q, seq, positions, sliding_window=window, softcap=softcap, variant=variant)
    want = [reference(cache, q[t], seq[t], positions[t], window, softcap) for t in range(len(seq))]
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=0, atol=5e-6)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    group=st.sampled_from((1, 2, 3, 8)),
    size=st.sampled_from((8, 16, 20, 32, 64)),
    window=st.sampled_from((0, 0, 1, 6, 33)),
    softcap=st.sampled_from((0.0, 2.0)),
    seed=st.integers(0, 2**31),
)
def test_prefill_in_one_go_is_decode_token_by_token(
    lengths, heads, group, size, window, softcap, seed
):
    cache = paged(seed, lengths, heads, size)
    seq = [i for i, n in enumerate(lengths) for _ in range(n)]
    positions = [p for n in lengths for p in range(n)]
    q = random(seed + 1, len(seq), heads * group, size)
    options = {"sliding_window": window, "softcap": softcap}
    whole = attend(cache, q, seq, positions, **options)
    order = torch.randperm(len(seq), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled_seq, shuffled_positions = [seq[t] for t in order], [positions[t] for t in order]
    shuffled = attend(cache, q[order], shuffled_seq, shuffled_positions, **options)
    assert same_bits(whole[order], shuffled)
    for t in range(len(seq)):
        alone = attend(cache, q[t : t + 1], [seq[t]], [positions[t]], **options)
        assert same_bits(whole[t], alone[0])
    for variant in cpu_kernels.variants():
        last = attend(cache, q[-3:], seq[-3:], positions[-3:], variant=variant, **options)
        assert same_bits(whole[-3:], last)


def test_attention_has_the_same_bits_on_any_number_of_threads_and_any_block_size():
    length, heads, size = 900, 2, 64
    q = random(3, 300, 6, size)
    positions = list(range(600, 900))
    alone = attend(paged(5, [length], heads, size), q, [0] * 300, positions)
    for threads, block in ((3, 4), (4, 16), (2, 1)):
        cache = paged(5, [length], heads, size, block)
        assert same_bits(alone, attend(cache, q, [0] * 300, positions, threads=threads))


def test_heads_and_tokens_may_have_any_strides():
    cache = paged(5, [6], 2, 16)
    q = random(1, 4, 6, 16)  # heads before tokens, as transformers holds them
    k, v = (torch.stack(rows).squeeze(0).transpose(0, 1) for rows in (cache.k, cache.v))
    want = attend(cache, q.transpose(0, 1).contiguous(), [0] * 6, list(range(6)))
    cache.k_cache.fill_(math.nan)
    cache.v_cache.fill_(math.nan)
    cpu_kernels.write_kv(
        k.contiguous().transpose(0, 1),
        v.contiguous().transpose(0, 1),
        cache.k_cache,
        cache.v_cache,
        cache.block_tables,
        int32(*[0] * 6),
        int32(*range(6)),
    )
    assert same_bits(want, attend(cache, q.transpose(0, 1), [0] * 6, list(range(6))))


def test_attention_survives_scores_that_only_the_maximum_keeps_finite():
    cache = paged(1, [50], 1, 32)
    q = 1e4 * random(2, 1, 1, 32)
    got = attend(cache, q, [0], [49])
    best = int(torch.einsum("d,kd->k", q[0, 0], cache.k[0][:, 0]).argmax())
    torch.testing.assert_close(got[0, 0], cache.v[0][best, 0])


def test_write_kv_writes_its_own_positions_only():
    k_cache, v_cache = torch.zeros(6, 4, 2, 8), torch.zeros(6, 4, 2, 8)
    tables = torch.tensor([[5, 2], [1, -1]], dtype=torch.int32)
    qkv = random(1, 3, 6, 8)
    k, v = qkv[:, 2:4], qkv[:, 4:]
    seq, positions = (torch.tensor(x, dtype=torch.int32) for x in ([0, 0, 1], [3, 4, 2]))
    cpu_kernels.write_kv(k, v, k_cache, v_cache, tables, seq, positions)
    for t, (block, offset) in enumerate(((5, 3), (2, 0), (1, 2))):
        assert torch.equal(k_cache[block, offset], k[t])
        assert torch.equal(v_cache[block, offset], v[t])
        k_cache[block, offset] = 0
    assert not k_cache.any()


def attention_arguments() -> dict[str, Any]:
    cache = paged(3, [9, 6], 2, 16)
    return {
        "q": random(1, 2, 4, 16),
        "k_cache": cache.k_cache,
        "v_cache": cache.v_cache,
        "block_tables": cache.block_tables,
        "seq_index": torch.tensor([0, 1], dtype=torch.int32),
        "positions": torch.tensor([8, 5], dtype=torch.int32),
        "scale": 0.25,
    }


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seq_index": int32(0, 2)}, r"seq_index\[1\] is 2"),
        ({"seq_index": int32(0, -1)}, r"seq_index\[1\] is -1"),
        ({"seq_index": int32(0)}, "seq_index must have size 2"),
        ({"seq_index": torch.tensor([0, 1])}, "int64"),
        ({"positions": int32(12, 0)}, r"positions\[0\] is 12"),
        ({"positions": int32(-1, 0)}, r"positions\[0\] is -1"),
        ({"positions": int32(2**31 - 1, 0)}, r"positions\[0\] is 2147483647"),
        ({"positions": int32(8, 0, 5, 0)[::2]}, "positions must be contiguous"),
        ({"block_tables": torch.full((2, 3), 9, dtype=torch.int32)}, "is 9, not one of 9 blocks"),
        ({"block_tables": torch.full((2, 3), -1, dtype=torch.int32)}, "is -1"),
        ({"block_tables": torch.zeros(2, 0, dtype=torch.int32)}, "outside a block table"),
        ({"block_tables": torch.zeros(0, 3, dtype=torch.int32)}, "not one of 0 sequences"),
        ({"block_tables": torch.zeros(2, 3)}, "block_tables must be int32"),
        ({"q": torch.zeros(2, 3, 16)}, "multiple of the cache's heads"),
        ({"q": torch.zeros(2, 0, 16)}, "multiple of the cache's heads"),
        ({"q": torch.zeros(2, 4, 15)}, "size 16"),
        ({"q": torch.zeros(2, 514, 16)}, "more than 256 heads"),
        ({"q": torch.zeros(2, 16, 4).transpose(1, 2)}, "q must be contiguous in dimension 2"),
        ({"v_cache": torch.zeros(8, 4, 2, 16)}, "v_cache must have size 9"),
        ({"k_cache": torch.zeros(9, 4, 2, 16, dtype=torch.float16)}, "k_cache must be float32"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": math.nan}, "softcap"),
        ({"threads": 0}, "threads"),
    ],
)
def test_attention_refuses(change, text):
    arguments = attention_arguments()
    cpu_kernels.paged_attention(**arguments)
    with pytest.raises(ValueError, match=text):
        cpu_kernels.paged_attention(**{**arguments, **change})


def test_blocks_before_the_window_need_not_exist():
    arguments = attention_arguments()
    tables = arguments["block_tables"].clone()
    tables[:, 0] = -1
    arguments |= {"sliding_window": 2, "threads": 1}
    want = cpu_kernels.paged_attention(**arguments)
    assert same_bits(want, cpu_kernels.paged_attention(**{**arguments, "block_tables": tables}))
    with pytest.raises(ValueError, match=r"block_tables\[0, 0\] is -1"):
        cpu_kernels.paged_attention(**{**arguments, "block_tables": tables, "sliding_window": 6})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": torch.zeros(1, 2, 8)}, "size 1"),
        ({"v": torch.zeros(2, 2, 7)}, "v must have size 8"),
        ({"k": torch.zeros(2, 1, 8)}, "k must have size 2"),
        ({"positions": int32(0, 8)}, r"positions\[1\] is 8"),
        ({"block_tables": int32(0, 1, 6, 3).reshape(2, 2)}, r"block_tables\[1, 0\] is 6"),
    ],
)
def test_write_kv_refuses(change, text):
    arguments: dict[str, Any] = {
        "k": torch.ones(2, 2, 8),
        "v": torch.ones(2, 2, 8),
        "k_cache": torch.zeros(6, 4, 2, 8),
        "v_cache": torch.zeros(6, 4, 2, 8),
        "block_tables": int32(0, 1, 2, 3).reshape(2, 2),
        "seq_index": int32(0, 1),
        "positions": int32(0, 1),
    }
    with pytest.raises(ValueError, match=text):
        cpu_kernels.write_kv(**{**arguments, **change})
    assert not arguments["k_cache"].any()
