"""CPU kernels: right against float64, the same bits however a batch is cut, no bad pointer."""

import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.infra.kernels import cpu_kernels
from gearfall.infra.kernels.cpu_kernels import Activation
from tests.gearfall.infra.tensors import random, same_bits

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROPERTY = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The references are small: torch's pool would only wait for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Linear layers


@pytest.mark.parametrize("variant", cpu_kernels.variants())
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(
    ("tokens", "k", "rows"), [(1, 1, 1), (1, 31, 5), (2, 33, 7), (7, 192, 19), (13, 100, 37)]
)
def test_linear_is_the_float64_product(variant, dtype, tokens, k, rows):
    x, weight, bias = random(1, tokens, k), random(2, rows, k).to(dtype), random(3, rows)
    want = x.double() @ weight.double().T + bias.double()
    got = cpu_kernels.linear(x, weight, bias, variant=variant)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * math.sqrt(k) + 1e-7)


def test_float16_weights_widen_exactly_for_every_value():
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = weight[weight.isfinite()].unsqueeze(1)
    for variant in cpu_kernels.variants():
        got = cpu_kernels.linear(torch.ones(1, 1), finite, variant=variant)
        assert torch.equal(got[0], finite[:, 0].float())


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@PROPERTY
@given(
    tokens=st.integers(1, 70),
    k=st.integers(1, 200),
    rows=st.integers(1, 40),
    row=st.integers(0, 69),
    seed=st.integers(0, 2**31),
)
def test_linear_row_has_the_same_bits_alone_and_in_any_batch(dtype, tokens, k, rows, row, seed):
    x, weight = random(seed, tokens, k), random(seed + 1, rows, k).to(dtype)
    row %= tokens
    batch = cpu_kernels.linear(x, weight)
    assert same_bits(batch[row], cpu_kernels.linear(x[row : row + 1], weight)[0])
    assert same_bits(batch[row:], cpu_kernels.linear(x[row:], weight))
    assert same_bits(batch[:, :1], cpu_kernels.linear(x, weight[:1]))


@PROPERTY
@given(
    tokens=st.integers(1, 20),
    k=st.integers(1, 100),
    rows=st.integers(1, 9),
    dtype=st.sampled_from(WEIGHT_DTYPES),
    seed=st.integers(0, 2**31),
)
def test_linear_has_the_same_bits_on_every_instruction_set(tokens, k, rows, dtype, seed):
    x, weight = random(seed, tokens, k), random(seed + 1, rows, k).to(dtype)
    first, *others = (cpu_kernels.linear(x, weight, variant=v) for v in cpu_kernels.variants())
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(("tokens", "k", "rows"), [(1, 1500, 2030), (70, 300, 517), (900, 129, 90)])
def test_linear_has_the_same_bits_on_any_number_of_threads(dtype, tokens, k, rows):
    x, weight, bias = random(1, tokens, k), random(2, rows, k).to(dtype), random(3, rows)
    alone = cpu_kernels.linear(x, weight, bias, threads=1)
    for threads in (2, 3, 5):
        assert same_bits(alone, cpu_kernels.linear(x, weight, bias, threads=threads))


def test_linear_takes_strided_rows_and_any_float_bias():
    wide, weight = random(1, 5, 90), random(2, 8, 90).bfloat16()
    bias = random(3, 8)
    x, w = wide[:, 10:70], weight[:, 10:70]
    want = cpu_kernels.linear(x.contiguous(), w.contiguous(), bias.bfloat16().float())
    assert same_bits(want, cpu_kernels.linear(x, w, bias.bfloat16()))


@pytest.mark.parametrize("variant", cpu_kernels.variants())
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(
    ("tokens", "k", "rows"), [(1, 2, 1), (1, 31, 5), (2, 33, 70), (7, 192, 163), (13, 100, 37)]
)
def test_linear_multiplies_a_transposed_weight_as_it_lies(variant, dtype, tokens, k, rows):
    x, stored, bias = random(1, tokens, k), random(2, k, rows + 3).to(dtype), random(3, rows)
    weight = stored[:, 2 : rows + 2].T
    want = x.double() @ weight.double().T + bias.double()
    got = cpu_kernels.linear(x, weight, bias, variant=variant)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6 * math.sqrt(k) + 1e-7)
    assert same_bits(got, cpu_kernels.linear(x, weight, bias, threads=3))
    assert same_bits(got, cpu_kernels.linear(x, weight, bias, is_rounded=True))


@PROPERTY
@given(
    tokens=st.integers(1, 40),
    k=st.integers(2, 90),
    rows=st.integers(1, 150),
    row=st.integers(0, 39),
    dtype=st.sampled_from(WEIGHT_DTYPES),
)
def test_a_transposed_weight_gives_a_row_the_same_bits_in_any_batch(tokens, k, rows, row, dtype):
    x, weight = random(1, tokens, k), random(2, k, rows).to(dtype).T
    row %= tokens
    batch = cpu_kernels.linear(x, weight)
    assert same_bits(batch[row], cpu_kernels.linear(x[row : row + 1], weight)[0])
    assert same_bits(batch[:, rows // 2 :], cpu_kernels.linear(x, weight[rows // 2 :]))


def test_linear_takes_a_parameter_and_an_empty_batch():
    weight = torch.nn.Parameter(random(2, 8, 16))
    assert cpu_kernels.linear(torch.empty(0, 16), weight).shape == (0, 8)
    assert cpu_kernels.linear(random(1, 2, 16), weight).shape == (2, 8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "2 dimensions"),
        ({"x": torch.zeros(1, 1, 1, 1, 1)}, "at most 4 dimensions"),
        ({"x": torch.zeros(2, 5)}, "weight must have size 5"),
        ({"x": torch.zeros(2, 4, dtype=torch.bfloat16)}, "x must be float32"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(4, 2).T}, "x must be contiguous"),
        ({"x": torch.zeros(2, 0), "weight": torch.zeros(3, 0)}, "at least one column"),
        ({"x": torch.zeros(2, 4, device="meta")}, "meta"),
        ({"weight": torch.zeros(3, 4, dtype=torch.int32)}, "not int32"),
        ({"weight": torch.zeros(6, 8)[::2, ::2]}, "weight must be contiguous"),
        ({"weight": torch.zeros(3)}, "2 dimensions"),
        ({"bias": torch.zeros(4)}, "bias must have size 3"),
        ({"bias": torch.zeros(6)[::2]}, "bias must be contiguous"),
        ({"threads": 0}, "threads"),
        ({"threads": 257}, "threads"),
        ({"variant": "sse9"}, "no variant sse9"),
    ],
)
def test_linear_refuses(change, text):
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "bias": torch.zeros(3),
    }
    cpu_kernels.linear(**arguments)
    with pytest.raises(ValueError, match=text):
        cpu_kernels.linear(**{**arguments, **change})


# Row kernels


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("k", [1, 15, 16, 192, 577])
def test_rms_norm_is_the_float64_norm(dtype, k):
    x, weight = random(1, 5, k), random(2, k).to(dtype)
    wide = x.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = cpu_kernels.rms_norm(x, weight, eps=1e-5)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
    for variant in cpu_kernels.variants():
        assert same_bits(got[3:4], cpu_kernels.rms_norm(x[3:4], weight, eps=1e-5, variant=variant))


@pytest.mark.parametrize("k", [1, 15, 16, 192, 577])
def test_silu_mul_is_the_float64_product(k):
    both = 8 * random(1, 5, 2 * k)
    gate, up = both[:, :k], both[:, k:]
    got = cpu_kernels.activate(Activation.SILU, gate, up)
    want = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-30)
    for variant in cpu_kernels.variants():
        assert same_bits(
            got[3:4], cpu_kernels.activate(Activation.SILU, gate[3:4], up[3:4], variant=variant)
        )


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("k", [1, 15, 16, 192, 577])
def test_layer_norm_is_the_float64_norm(dtype, k):
    x, weight, bias = 3 + random(1, 5, k), random(2, k).to(dtype), random(3, k).to(dtype)
    want = torch.nn.functional.layer_norm(x.double(), (k,), weight.double(), bias.double(), 1e-5)
    got = cpu_kernels.layer_norm(x, weight, bias, eps=1e-5)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=5e-6)
    for variant in cpu_kernels.variants():
        alone = cpu_kernels.layer_norm(x[3:4], weight, bias, eps=1e-5, variant=variant)
        assert same_bits(got[3:4], alone)


REFERENCES = {
    Activation.SILU: torch.nn.functional.silu,
    Activation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    Activation.RELU: torch.nn.functional.relu,
}


@pytest.mark.parametrize("activation", cpu_kernels.Activation)
@pytest.mark.parametrize("k", [1, 15, 16, 192, 577])
def test_an_activation_is_the_float64_function(activation, k):
    both = 8 * random(1, 5, 2 * k)
    gate, up = both[:, :k], both[:, k:]
    want = REFERENCES[activation](gate.double())
    got = cpu_kernels.activate(activation, gate)
    torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=1e-7)
    times = cpu_kernels.activate(activation, gate, up)
    assert same_bits(times, got * up)
    for variant in cpu_kernels.variants():
        alone = cpu_kernels.activate(activation, gate[3:4], up[3:4], variant=variant)
        assert same_bits(times[3:4], alone)


@pytest.mark.parametrize("activation", cpu_kernels.Activation)
@pytest.mark.parametrize("extreme", [-1e30, -30.0, -0.0, 0.0, 30.0, 1e30])
def test_an_activation_stays_finite_at_the_ends(activation, extreme):
    got = cpu_kernels.activate(activation, torch.full((1, 17), extreme))
    want = max(extreme, 0.0) if abs(extreme) > 1 else 0.0
    torch.testing.assert_close(got, torch.full((1, 17), want), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("extreme", [-1e30, -100.0, -87.5, -0.0, 0.0, 87.5, 1e30])
def test_silu_mul_stays_finite_at_the_ends(extreme):
    got = cpu_kernels.activate(Activation.SILU, torch.full((1, 17), extreme), torch.ones(1, 17))
    want = torch.nn.functional.silu(torch.tensor(extreme, dtype=torch.float64))
    torch.testing.assert_close(got.double(), want.expand(1, 17), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cpu_kernels.rms_norm(torch.zeros(2, 4), torch.ones(5), eps=0.1),
        lambda: cpu_kernels.rms_norm(torch.zeros(4, 2).T, torch.ones(4), eps=0.1),
        lambda: cpu_kernels.rms_norm(torch.zeros(4), torch.ones(4), eps=0.1),
        lambda: cpu_kernels.rms_norm(torch.zeros(2, 4), torch.ones(4), eps=-0.1),
        lambda: cpu_kernels.layer_norm(torch.zeros(2, 4), torch.ones(4), torch.ones(5), eps=0.1),
        lambda: cpu_kernels.layer_norm(torch.zeros(2, 4), torch.ones(5), torch.ones(4), eps=0.1),
        lambda: cpu_kernels.layer_norm(torch.zeros(2, 4), torch.ones(4), torch.ones(4), eps=-0.1),
        lambda: cpu_kernels.activate(Activation.RELU, torch.zeros(4)),
        lambda: cpu_kernels.activate(Activation.SILU, torch.zeros(2, 4), torch.zeros(2, 5)),
        lambda: cpu_kernels.activate(Activation.SILU, torch.zeros(2, 4), torch.zeros(1, 4)),
        lambda: cpu_kernels.activate(Activation.SILU, torch.zeros(4), torch.zeros(4)),
    ],
)
def test_row_kernels_refuse(call: Callable[[], torch.Tensor]):
    with pytest.raises(ValueError, match="must"):
        call()


# Threads and forks


def busy_linear() -> torch.Tensor:
    return cpu_kernels.linear(random(1, 64, 256), random(2, 4096, 256).bfloat16(), threads=3)


def test_callers_on_several_threads_get_their_own_answers():
    want = busy_linear()
    answers: list[bool] = []

    def call():
        answers.extend(same_bits(want, busy_linear()) for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert answers == [True] * 60


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_child_forked_after_a_parallel_call_starts_its_own_pool():
    x, weight = random(1, 64, 256), random(2, 4096, 256).bfloat16()
    want = cpu_kernels.linear(x, weight, threads=3)
    child = os.fork()
    if child == 0:
        is_right = False
        try:
            got = cpu_kernels.linear(x, weight, threads=3)
            is_right = same_bits(want, got) and len(list(Path("/proc/self/task").iterdir())) == 3
        finally:
            os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
