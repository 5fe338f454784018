"""Saved for some ranks, loaded for others: every tensor bit for bit what torch slices."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gearfall.checkpoint.plan_reader import BLOCK_BYTES, read_plan
from gearfall.checkpoint.rank_tensors import open_tensor, rank_tensors
from gearfall.checkpoint.reshard import Part, Piece, TensorPlan, plan_rank, plan_slice
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest
from tests.gearfall.checkpoint.conversions import (
    GPT2,
    LLAMA,
    Converted,
    convert_source,
    gpt2_weights,
    llama_weights,
    save_source,
)

RANKS = (1, 2, 3, 4)
HEAD = 4
"""Elements of an attention head in both models."""
LLAMA_HEADS = {
    1: [[0, 1, 2, 3]],
    2: [[0, 1], [2, 3]],
    3: [[0], [1], [2, 3]],
    4: [[0], [1], [2], [3]],
}
"""Query heads of each rank: with two KV heads, heads 0 and 1 share one, 2 and 3 the other."""
LLAMA_KV_HEADS = {1: [[0, 1]], 2: [[0], [1]], 3: [[0], [0], [1]], 4: [[0], [0], [1], [1]]}
GPT2_HEADS = {
    1: [[0, 1, 2, 3, 4, 5]],
    2: [[0, 1, 2], [3, 4, 5]],
    3: [[0, 1], [2, 3], [4, 5]],
    4: [[0], [1, 2], [3], [4, 5]],
}


class OpenFds:
    def __init__(self) -> None:
        self.fds: list[int] = []

    def __call__(self, converted: Converted) -> list[int]:
        for partition in converted.manifest.partitions:
            self.fds.append(os.open(converted.directory / partition.file, os.O_RDONLY))
        return self.fds


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Converted]:
    home = tmp_path_factory.mktemp("llama")
    source = save_source(home / "source", llama_weights(), LLAMA)
    return {ranks: convert_source(source, home / str(ranks), ranks) for ranks in RANKS}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Converted]:
    home = tmp_path_factory.mktemp("gpt2")
    source = save_source(home / "source", gpt2_weights(), GPT2)
    return {ranks: convert_source(source, home / str(ranks), ranks) for ranks in RANKS}


def rows_of(heads: list[int], begin: int = 0) -> list[int]:
    return [begin + head * HEAD + i for head in heads for i in range(HEAD)]


def share(length: int, rank: int, ranks: int) -> slice:
    return slice(rank * length // ranks, (rank + 1) * length // ranks)


def llama_slice(name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    if "q_proj" in name:
        return whole[rows_of(LLAMA_HEADS[ranks][rank])]
    if "k_proj" in name or "v_proj" in name:
        return whole[rows_of(LLAMA_KV_HEADS[ranks][rank])]
    if "o_proj" in name:
        return whole[:, rows_of(LLAMA_HEADS[ranks][rank])]
    if "down_proj" in name:
        return whole[:, share(10, rank, ranks)]
    if "norm" in name:
        return whole
    return whole[share(len(whole), rank, ranks)]


def gpt2_slice(name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    heads = GPT2_HEADS[ranks][rank]
    fused = [row for begin in (0, 24, 48) for row in rows_of(heads, begin)]
    if "c_attn" in name:
        return whole[..., fused]
    if name == "h.0.attn.c_proj.weight":
        return whole[rows_of(heads)]
    if "c_fc" in name:
        return whole[..., share(96, rank, ranks)]
    if name in ("wte.weight", "h.0.mlp.c_proj.weight"):
        return whole[share(len(whole), rank, ranks)]
    return whole


@pytest.mark.parametrize("loaded", RANKS)
@pytest.mark.parametrize("saved", RANKS)
def test_llama_for_any_ranks(llama: dict[int, Converted], saved: int, loaded: int):
    converted, weights = llama[saved], llama_weights()
    for rank in range(loaded):
        found = rank_tensors(converted.manifest, converted.partitions, rank, loaded)
        assert found.keys() == weights.keys()
        for name, whole in weights.items():
            assert torch.equal(found[name], llama_slice(name, whole, rank, loaded)), name


@pytest.mark.parametrize("loaded", RANKS)
@pytest.mark.parametrize("saved", RANKS)
def test_gpt2_for_any_ranks(gpt2: dict[int, Converted], saved: int, loaded: int):
    converted, weights = gpt2[saved], gpt2_weights()
    for rank in range(loaded):
        found = rank_tensors(converted.manifest, converted.partitions, rank, loaded)
        for name, whole in weights.items():
            assert torch.equal(found[name], gpt2_slice(name, whole, rank, loaded)), name


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_reads_its_own_partition_only_and_copies_nothing(
    llama: dict[int, Converted], ranks: int
):
    for rank in range(ranks):
        for plan in plan_rank(llama[ranks].manifest, rank, ranks).values():
            assert plan.is_view
            assert {piece.partition for piece in plan.pieces} <= {rank}


def test_fewer_ranks_gather_only_what_is_cut_along_the_rows(llama: dict[int, Converted]):
    plans = plan_rank(llama[4].manifest, 0, 2)
    copied = {name for name, plan in plans.items() if not plan.is_view}
    assert "model.layers.0.self_attn.o_proj.weight" in copied
    assert "model.norm.weight" not in copied


@pytest.mark.parametrize("saved", RANKS)
def test_streamed_from_files_it_is_the_same(
    gpt2: dict[int, Converted], saved: int, open_fds: OpenFds
):
    converted = gpt2[saved]
    fds = open_fds(converted)
    for rank in range(2):
        for name, plan in plan_rank(converted.manifest, rank, 2).items():
            streamed = bytearray()
            read_plan(plan, fds, streamed.extend)
            expected = gpt2_slice(name, gpt2_weights()[name], rank, 2).contiguous()
            assert streamed == bytes(expected.view(torch.uint8).numpy()), name


@pytest.fixture
def open_fds() -> Iterator[OpenFds]:
    opened = OpenFds()
    yield opened
    for fd in opened.fds:
        os.close(fd)


def test_rows_longer_than_a_block_are_streamed_too(tmp_path: Path):
    row = BLOCK_BYTES + 4096
    content = os.urandom(3 * row)
    (tmp_path / "file").write_bytes(content)
    plan = plan_slice("uint8", (3, row), 1, (Part(0, 0, ((0, row),)),), ((5, row - 7),))
    streamed = bytearray()
    with (tmp_path / "file").open("rb") as file:
        read_plan(plan, (file.fileno(),), streamed.extend)
    assert streamed == b"".join(content[i * row + 5 : (i + 1) * row - 7] for i in range(3))


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(99))
    plan = TensorPlan("uint8", (100,), 1, (Piece(0, 0, 100, 100),))
    with (tmp_path / "file").open("rb") as file, pytest.raises(CorruptCheckpoint, match="99"):
        read_plan(plan, (file.fileno(),), lambda block: None)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 0), (-1, 2), (2, 2), (0, 65)])
def test_ranks_that_are_none(llama: dict[int, Converted], rank: int, ranks: int):
    with pytest.raises(InvalidRequest):
        plan_rank(llama[1].manifest, rank, ranks)


def test_more_ranks_than_heads_are_refused(llama: dict[int, Converted]):
    with pytest.raises(InvalidRequest, match="indivisible"):
        plan_rank(llama[1].manifest, 0, 9)


@st.composite
def slices(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[list[tuple[int, int]]]]:
    """A shape, a dimension, and parts that hold every element of it, some of them twice."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dimension = draw(st.integers(0, len(shape) - 1))
    length = shape[dimension]
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=4)) | {0, length})
    ranges = list(itertools.pairwise(cuts))
    extra = draw(st.lists(st.sampled_from(ranges), max_size=2))
    owner = [draw(st.integers(0, 2)) for _ in ranges + extra]
    parts = [[r for r, o in zip(ranges + extra, owner, strict=True) if o == p] for p in range(3)]
    return shape, dimension, parts


@given(slices(), st.data())
def test_any_slice_of_any_parts(
    drawn: tuple[tuple[int, ...], int, list[list[tuple[int, int]]]], data: st.DataObject
):
    shape, dimension, ranges = drawn
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).view(shape)
    partitions, parts = [], []
    for number, owned in enumerate(ranges):
        stretches = [whole.narrow(dimension, a, b - a) for a, b in owned]
        stored = torch.cat(stretches, dimension).numpy().tobytes() if owned else b""
        partitions.append(bytearray(256 + len(stored)))
        partitions[-1][256:] = stored
        parts.append(Part(number, 256, tuple(owned)))
    length = shape[dimension]
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    wanted = ((start, stop), (0, start))
    plan = plan_slice("int16", shape, dimension, parts, wanted)
    expected = torch.cat([whole.narrow(dimension, a, b - a) for a, b in wanted], dimension)
    assert torch.equal(open_tensor(plan, partitions), expected)
    assert sum(size for _, _, size in plan.byte_ranges()) == expected.nbytes
