"""The native decoder: the same bits as single kernels, on every path; no bad pointer."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from gearfall.infra.kernels import cpu_kernels
from gearfall.infra.kernels.cpu_decoder import AdapterTokens, Decoder, Layer, Linear, LowRank, Step
from gearfall.infra.kernels.cpu_kernels import Activation
from tests.gearfall.infra.tensors import same_bits

WIDTH, HEADS, KV_HEADS, SIZE, INNER, VOCABULARY, BLOCK = 40, 4, 2, 20, 70, 33, 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model's layers are cut from."""

    width: int = WIDTH
    head_size: int = SIZE
    inner: int = INNER
    blocks: int = 8


# Work for several threads and tiles of tokens; heads are packed as they are computed.
WIDE = Sizes(width=168, head_size=32, inner=330, blocks=24)


class Model:
    """Seeded weights of two layers, the second with head norms and biases."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, sizes: Sizes | None = None) -> None:
        self.sizes = sizes or Sizes()
        self._generator = torch.Generator().manual_seed(3)
        self.embedding = self._random(VOCABULARY, self.sizes.width).to(dtype)
        self.layers = [self._layer(dtype, is_rich=False), self._layer(dtype, is_rich=True)]
        self.norm = self._random(self.sizes.width)
        self.head = Linear(self._random(VOCABULARY, self.sizes.width).to(dtype))

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _linear(self, outputs: int, inputs: int, dtype: torch.dtype, is_rich: bool) -> Linear:
        weight = (self._random(outputs, inputs) / inputs**0.5).to(dtype)
        return Linear(weight, self._random(outputs) if is_rich else None)

    def _layer(self, dtype: torch.dtype, *, is_rich: bool) -> Layer:
        def linear(outputs: int, inputs: int) -> Linear:
            return self._linear(outputs, inputs, dtype, is_rich)

        width, size = self.sizes.width, self.sizes.head_size
        inner, blocks = self.sizes.inner, self.sizes.blocks
        return Layer(
            attention_norm=self._random(width),
            q=linear(HEADS * size, width),
            k=linear(KV_HEADS * size, width),
            v=linear(KV_HEADS * size, width),
            o=linear(width, HEADS * size),
            q_norm=self._random(size) if is_rich else None,
            k_norm=self._random(size) if is_rich else None,
            mlp_norm=self._random(width),
            gate=linear(inner, width),
            up=linear(inner, width),
            down=linear(width, inner),
            k_cache=torch.zeros(blocks, BLOCK, KV_HEADS, size),
            v_cache=torch.zeros(blocks, BLOCK, KV_HEADS, size),
            scale=size**-0.5,
            sliding_window=3 if is_rich else 0,
        )

    def decoder(self, **changes: Any) -> Decoder:
        parts: dict[str, Any] = {
            "embedding": self.embedding,
            "layers": self.layers,
            "norm": self.norm,
            "head": self.head,
            "eps": 1e-5,
        }
        return Decoder(**{**parts, **changes})


def step(**changes: torch.Tensor) -> Step:
    """Two sequences: five tokens of one from its start, the first token of the other."""
    angle = torch.arange(16.0)[:, None] * torch.tensor([1.0, 0.5, 0.2] * 2)
    parts: dict[str, Any] = {
        "token_ids": torch.tensor([3, 1, 4, 1, 5, 32], dtype=torch.int32),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "block_tables": torch.tensor([[7, 2, 4, 6], [1, 0, 0, 0]], dtype=torch.int32),
        "seq_index": torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.int32),
        "positions": torch.tensor([0, 1, 2, 3, 4, 0], dtype=torch.int32),
        "logit_rows": torch.tensor([5, 4], dtype=torch.int32),
    }
    return Step(**{**parts, **changes})


def one_by_one(model: Model, at: Step, *, is_rounded: bool) -> torch.Tensor:
    """What the decoder computes, by single kernels and torch's additions."""

    def linear(x: torch.Tensor, each: Linear) -> torch.Tensor:
        return cpu_kernels.linear(x, each.weight, each.bias, is_rounded=is_rounded)

    size = model.sizes.head_size
    x = model.embedding[at.token_ids.long()].float()
    cos, sin = (table[at.positions.long()][:, None] for table in (at.cos, at.sin))
    for layer in model.layers:
        a = cpu_kernels.rms_norm(x, layer.attention_norm, eps=1e-5)
        q, k, v = (linear(a, each).view(len(x), -1, size) for each in (layer.q, layer.k, layer.v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q = cpu_kernels.rms_norm(q.reshape(-1, size), layer.q_norm, eps=1e-5).view(q.shape)
            k = cpu_kernels.rms_norm(k.reshape(-1, size), layer.k_norm, eps=1e-5).view(k.shape)
        q, k = (rotated(each, cos, sin) for each in (q, k))
        where = (layer.k_cache, layer.v_cache, at.block_tables, at.seq_index, at.positions)
        cpu_kernels.write_kv(k, v, *where)
        attended = cpu_kernels.paged_attention(
            q, *where, scale=layer.scale, sliding_window=layer.sliding_window
        )
        x = x + linear(attended.flatten(1), layer.o)
        b = cpu_kernels.rms_norm(x, layer.mlp_norm, eps=1e-5)
        assert layer.up is not None
        gate, up = linear(b, layer.gate), linear(b, layer.up)
        hidden = cpu_kernels.activate(Activation.SILU, gate, up)
        x = x + linear(hidden, layer.down)
    rows = cpu_kernels.rms_norm(x[at.logit_rows.long()], model.norm, eps=1e-5)
    return linear(rows, model.head)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turning.chunk(2, dim=-1)
    half = torch.cat((-high, low), dim=-1)
    return torch.cat((turning * cos + half * sin, still), dim=-1)


@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_has_the_bits_of_single_kernels_on_every_path(dtype, is_rounded):
    model = Model(dtype)
    want = one_by_one(model, step(), is_rounded=is_rounded)
    assert want.std() > 0.1
    caches = [layer.k_cache.clone() for layer in model.layers]
    for variant in cpu_kernels.variants():
        for threads in (1, 3):
            for layer in model.layers:
                layer.k_cache.zero_()
                layer.v_cache.zero_()
            got = model.decoder().run(
                step(), threads=threads, is_rounded=is_rounded, variant=variant
            )
            assert same_bits(got, want)
            for layer, cache in zip(model.layers, caches, strict=True):
                assert same_bits(layer.k_cache, cache)


@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("tokens", [6, 20])
def test_a_batch_has_the_bits_of_single_kernels_on_every_path(tokens, is_rounded):
    model = Model(sizes=WIDE)
    each = torch.arange(tokens, dtype=torch.int32)
    at = step(
        token_ids=each % VOCABULARY,
        block_tables=(23 - each)[:, None],
        seq_index=each,
        positions=torch.zeros(tokens, dtype=torch.int32),
        logit_rows=each,
    )
    want = one_by_one(model, at, is_rounded=is_rounded)
    assert want.std() > 0.1
    for variant in cpu_kernels.variants():
        for threads in (1, 3):
            for layer in model.layers:
                layer.k_cache.zero_()
                layer.v_cache.zero_()
            decoder = model.decoder()
            for _ in range(3):
                got = decoder.run(at, threads=threads, is_rounded=is_rounded, variant=variant)
                assert same_bits(got, want)


def test_a_step_has_the_same_bits_token_by_token():
    whole = Model()
    want = whole.decoder().run(step(), threads=1)[1]
    model = Model()
    decoder = model.decoder()
    for place in range(5):
        one = slice(place, place + 1)
        rows = decoder.run(
            step(
                token_ids=step().token_ids[one],
                seq_index=step().seq_index[one],
                positions=step().positions[one],
                logit_rows=torch.zeros(1, dtype=torch.int32),
            ),
            threads=1,
        )
    assert same_bits(rows[0], want)


def test_a_step_may_want_no_logits_and_have_no_tokens():
    empty = torch.zeros(0, dtype=torch.int32)
    decoder = Model().decoder()
    assert decoder.run(step(logit_rows=empty), threads=2).shape == (0, VOCABULARY)
    nothing = step(token_ids=empty, seq_index=empty, positions=empty, logit_rows=empty)
    assert decoder.run(nothing, threads=2).shape == (0, VOCABULARY)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"token_ids": ints(3, 1, 4, 1, 5, VOCABULARY)}, r"token_ids\[5\] is 33"),
        ({"token_ids": ints(-1, 1, 4, 1, 5, 0)}, r"token_ids\[0\] is -1"),
        ({"token_ids": ints(1, 2)}, "must have size 2"),
        ({"token_ids": torch.zeros(6, dtype=torch.float32)}, "token_ids must be int32"),
        ({"positions": ints(0, 1, 2, 3, 16, 0)}, "outside a block table"),
        ({"cos": torch.zeros(4, 6), "sin": torch.zeros(4, 6)}, r"positions\[4\] is 4"),
        ({"cos": torch.zeros(16, 5), "sin": torch.zeros(16, 5)}, "even"),
        ({"cos": torch.zeros(16, 22), "sin": torch.zeros(16, 22)}, "at most the size of a head"),
        ({"sin": torch.zeros(16, 4)}, "sin must have size 6"),
        ({"seq_index": ints(0, 0, 0, 0, 0, 2)}, "not one of 2 sequences"),
        ({"block_tables": torch.full((2, 4), 8, dtype=torch.int32)}, "not one of 8 blocks"),
        ({"logit_rows": ints(6)}, r"logit_rows\[0\] is 6"),
        ({"logit_rows": ints(*[0] * 7)}, "must not be more"),
    ],
)
def test_a_step_is_refused(change, text):
    decoder = Model().decoder()
    with pytest.raises(ValueError, match=text):
        decoder.run(step(**change), threads=1)


@pytest.mark.parametrize("threads", [0, 257])
def test_a_number_of_threads_is_refused(threads):
    with pytest.raises(ValueError, match="threads"):
        Model().decoder().run(step(), threads=threads)


@pytest.mark.parametrize(
    ("field", "part", "text"),
    [
        ("q", Linear(torch.zeros(HEADS * SIZE, WIDTH)), "must be float32, not bfloat16"),
        ("q", Linear(torch.zeros(HEADS * SIZE + 1, WIDTH).bfloat16()), "must have size 80"),
        ("k", Linear(torch.zeros(KV_HEADS * SIZE, WIDTH - 1).bfloat16()), "must have size 40"),
        ("o", Linear(torch.zeros(WIDTH, WIDTH).bfloat16()), "must have size 80"),
        ("up", Linear(torch.zeros(INNER - 1, WIDTH).bfloat16()), "must have size 70"),
        ("down", Linear(torch.zeros(WIDTH, INNER + 1).bfloat16()), "must have size 70"),
        ("gate", Linear(torch.zeros(0, WIDTH).bfloat16()), "size"),
        ("mlp_norm", torch.zeros(WIDTH + 1), "must have size 40"),
        ("attention_norm", torch.zeros(WIDTH).bfloat16(), "must be float32"),
        ("q_norm", torch.zeros(SIZE - 1), "must have size 20"),
        ("v_cache", torch.zeros(7, BLOCK, KV_HEADS, SIZE), "must have size 8"),
        ("k_cache", torch.zeros(8, BLOCK, KV_HEADS, 2 * SIZE)[..., ::2], "contiguous"),
        ("scale", 0.0, "scale"),
        ("sliding_window", -1, "sliding_window"),
    ],
)
def test_weights_that_do_not_fit_are_refused(field, part, text):
    model = Model()
    changed = replace(model.layers[1], **{field: part})
    with pytest.raises(ValueError, match=text):
        model.decoder(layers=[model.layers[0], changed])


def low_rank(inputs: int, outputs: int, rank: int = 3) -> LowRank:
    generator = torch.Generator().manual_seed(inputs)
    a = torch.randn(rank, inputs, generator=generator).bfloat16()
    return LowRank(a, torch.randn(outputs, rank, generator=generator).bfloat16(), 0.3)


def test_an_adapter_changes_its_tokens_until_it_is_detached():
    decoder = Model().decoder()
    plain = decoder.run(step(), threads=2)
    decoder.attach(7, [{}, {"up": low_rank(WIDTH, INNER)}])
    some = replace(step(), adapters=(AdapterTokens(7, ints(0, 1, 2, 3, 4)),))
    changed = decoder.run(some, threads=2)
    assert same_bits(changed[0], plain[0])
    assert (changed[1] - plain[1]).abs().max() > 0.01
    assert same_bits(decoder.run(step(), threads=2), plain)
    decoder.detach(7)
    decoder.detach(7)
    with pytest.raises(ValueError, match="not attached"):
        decoder.run(some, threads=2)


@pytest.mark.parametrize(
    ("updates", "text"),
    [
        ([{}], "as many layers"),
        ([{}, {"q": low_rank(WIDTH + 1, HEADS * SIZE)}], "a must have size 40"),
        ([{}, {"down": low_rank(INNER, WIDTH + 1)}], "b must have size 40"),
        ([{}, {"k": low_rank(WIDTH, KV_HEADS * SIZE, 0)}], "at least one row"),
        ([{"v": LowRank(torch.zeros(2, WIDTH), torch.zeros(40, 3), 1.0)}, {}], "must have size 2"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(updates, text):
    with pytest.raises(ValueError, match=text):
        Model().decoder().attach(1, updates)


@pytest.mark.parametrize(
    ("tokens", "text"), [(ints(6), r"tokens\[0\] is 6"), (ints(-1), r"tokens\[0\] is -1")]
)
def test_tokens_of_an_adapter_that_are_not_there_are_refused(tokens, text):
    decoder = Model().decoder()
    decoder.attach(1, [{}, {}])
    with pytest.raises(ValueError, match=text):
        decoder.run(replace(step(), adapters=(AdapterTokens(1, tokens),)), threads=1)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"norm": torch.zeros(WIDTH - 1)},
        {"head": Linear(torch.zeros(VOCABULARY, WIDTH + 1))},
        {"embedding": torch.zeros(VOCABULARY, WIDTH - 1)},
        {"embedding": torch.zeros(VOCABULARY)},
        {"eps": -1.0},
    ],
)
def test_a_decoder_whose_ends_do_not_fit_is_refused(change):
    with pytest.raises(ValueError, match="must"):
        Model().decoder(**change)
