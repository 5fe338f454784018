"""Products of rounded tokens: bfloat16's own product, the same bits everywhere."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.infra.kernels import cpu_kernels
from gearfall.infra.kernels.cpu_kernels import Activation
from tests.gearfall.infra.tensors import random, same_bits

PROPERTY = settings(max_examples=40, deadline=None)


def bits(seed: int, *shape: int) -> torch.Tensor:
    """Bfloat16 numbers of every size, none of them infinite or not a number."""
    drawn = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(seed))
    numbers = drawn.to(torch.int16).view(torch.bfloat16)
    return torch.where(numbers.isfinite(), numbers, torch.zeros_like(numbers))


def rounded(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    threads: int = 1,
    variant: str = "",
) -> torch.Tensor:
    return cpu_kernels.linear(x, weight, bias, is_rounded=True, threads=threads, variant=variant)


@pytest.mark.parametrize("variant", cpu_kernels.variants())
@pytest.mark.parametrize(
    ("tokens", "k", "rows"), [(1, 1, 1), (1, 31, 5), (2, 33, 7), (7, 192, 19), (13, 100, 37)]
)
def test_it_is_the_product_of_tokens_rounded_as_torch_rounds(variant, tokens, k, rows):
    x, weight, bias = random(1, tokens, k), random(2, rows, k).bfloat16(), random(3, rows)
    want = x.bfloat16().double() @ weight.double().T + bias.double()
    got = rounded(x, weight, bias, variant=variant)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * math.sqrt(k) + 1e-7)


@pytest.mark.parametrize("variant", cpu_kernels.variants())
def test_every_token_is_rounded_to_the_nearest_ties_to_even(variant):
    upper = torch.arange(0x3F80, 0x4000, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    x = (upper[:, None] | lower).view(torch.float32).reshape(-1, 1)
    got = rounded(x, torch.ones(1, 1).bfloat16(), variant=variant)
    assert torch.equal(got, x.bfloat16().float())
    assert len(got.unique()) == 129


@pytest.mark.parametrize("variant", cpu_kernels.variants())
def test_what_is_no_number_stays_none(variant):
    x = torch.tensor([[math.nan], [math.inf], [-math.inf]])
    got = rounded(x, torch.ones(1, 1).bfloat16(), variant=variant)
    assert got[0].isnan()
    assert got[1:].flatten().tolist() == [math.inf, -math.inf]


@PROPERTY
@given(
    tokens=st.integers(1, 20), k=st.integers(1, 100), rows=st.integers(1, 9), seed=st.integers(0)
)
def test_it_has_the_same_bits_on_every_instruction_set(tokens, k, rows, seed):
    seed %= 2**31
    x, weight = random(seed, tokens, k), random(seed + 1, rows, k).bfloat16()
    each = [rounded(x, weight, variant=variant) for variant in cpu_kernels.variants()]
    assert all(same_bits(one, other) for one, other in pairwise(each))


@PROPERTY
@given(k=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_it_has_the_same_bits_for_numbers_of_every_size(k, seed):
    x, weight = bits(seed, 3, k).float() * 2.0**-20, bits(seed + 1, 5, k)
    each = [rounded(x, weight, variant=variant) for variant in cpu_kernels.variants()]
    for one, other in pairwise(each):
        assert torch.equal(one.isnan(), other.isnan())
        assert same_bits(one.nan_to_num(nan=0.0), other.nan_to_num(nan=0.0))


@pytest.mark.parametrize("variant", cpu_kernels.variants())
def test_numbers_too_small_for_a_whole_exponent_are_zero_and_stay_so_only_inside(variant):
    tiny = torch.full((1, 2), 2.0**-130)
    weight = torch.full((1, 2), 2.0**10).bfloat16()
    assert rounded(tiny, weight, variant=variant).item() == 0.0
    small = torch.full((1, 2), 2.0**-100)
    assert rounded(small, torch.full((1, 2), 2.0**-30).bfloat16(), variant=variant).item() == 0.0
    assert cpu_kernels.linear(tiny, weight, variant=variant).item() == 2.0**-119
    assert cpu_kernels.activate(Activation.SILU, tiny[:, :1], torch.ones(1, 1)).item() == 2.0**-131


@PROPERTY
@given(
    tokens=st.integers(1, 70),
    k=st.integers(1, 200),
    rows=st.integers(1, 40),
    row=st.integers(0, 69),
    seed=st.integers(0, 2**31),
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(tokens, k, rows, row, seed):
    x, weight = random(seed, tokens, k), random(seed + 1, rows, k).bfloat16()
    row %= tokens
    batch = rounded(x, weight)
    assert same_bits(batch[row], rounded(x[row : row + 1], weight)[0])
    assert same_bits(batch[row:], rounded(x[row:], weight))
    assert same_bits(batch[:, :1], rounded(x, weight[:1]))


@pytest.mark.parametrize(("tokens", "k", "rows"), [(1, 1500, 2030), (70, 300, 517), (900, 129, 90)])
def test_it_has_the_same_bits_on_any_number_of_threads(tokens, k, rows):
    x, weight, bias = random(1, tokens, k), random(2, rows, k).bfloat16(), random(3, rows)
    alone = rounded(x, weight, bias)
    assert all(same_bits(alone, rounded(x, weight, bias, threads)) for threads in (2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_weights_are_multiplied_with_tokens_as_they_are(dtype):
    x, weight = random(1, 5, 90), random(2, 8, 90).to(dtype)
    assert same_bits(rounded(x, weight), cpu_kernels.linear(x, weight))
    assert not same_bits(rounded(x, weight.bfloat16()), cpu_kernels.linear(x, weight.bfloat16()))


@PROPERTY
@given(
    tokens=st.integers(1, 40),
    exact=st.integers(0, 40),
    k=st.integers(1, 100),
    rows=st.integers(1, 40),
    threads=st.integers(1, 3),
)
def test_its_first_rows_may_stay_exact(tokens, exact, k, rows, threads):
    exact = min(exact, tokens)
    x, weight, bias = random(1, tokens, k), random(2, rows, k).bfloat16(), random(3, rows)
    got = cpu_kernels.linear(x, weight, bias, is_rounded=True, exact_rows=exact, threads=threads)
    assert same_bits(got[:exact], cpu_kernels.linear(x[:exact], weight, bias))
    assert same_bits(got[exact:], rounded(x[exact:], weight, bias))


@pytest.mark.parametrize("exact", [-1, 3])
def test_more_exact_rows_than_there_are_are_refused(exact):
    with pytest.raises(ValueError, match="exact_rows"):
        cpu_kernels.linear(torch.zeros(2, 4), torch.zeros(3, 4), exact_rows=exact)
