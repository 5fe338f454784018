"""LoRA beside the base: equal to merged weights, and the same bits in every batch."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gearfall.core.checkpoint.manifest import manifest_digest
from gearfall.core.errors import Conflict, CorruptCheckpoint, GearfallError, InvalidRequest
from gearfall.core.generation.arithmetic import Arithmetic
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS
from services.worker.engine.batching.packing import AdapterRows, PackedStep
from services.worker.engine.model.engine_model import EngineModel, build_model
from services.worker.engine.model.ops import NativeOps, Ops, TorchOps
from tests.services.worker.tiny_adapters import TinyAdapter, merge, save_adapter, tiny_adapter
from tests.services.worker.tiny_checkpoints import TinyCheckpoint, random_model, tiny_checkpoint

TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj", "lm_head"),
    "llama-tied": ("embed_tokens", "o_proj"),
    "gpt2": ("c_attn", "c_fc", "wte"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "gemma3": ("k_proj", "up_proj"),
    "opt": ("q_proj", "fc2"),
}
LAYER_TARGETS = ("q_proj", "gate_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
PROMPTS = ([5, 9, 1, 33, 20, 4, 4, 60], [17, 50, 6], list(range(1, 21)), [3, 3, 40, 8])


class Bench:
    """A base with two adapters, in memory."""

    def __init__(
        self, family: str, home: Path, stack: ExitStack, targets: Sequence[str] = ()
    ) -> None:
        self.model = random_model(family)
        self.checkpoint: TinyCheckpoint = stack.enter_context(tiny_checkpoint(self.model, home))
        self.adapters: list[TinyAdapter] = []
        configs: tuple[dict[str, Any], ...] = (
            {"use_rslora": True},
            {"alpha_pattern": {"q_proj": 5}},
        )
        for number, config in enumerate(configs):
            source = save_adapter(
                self.model,
                (targets or TARGETS[family])[number:],
                home / f"adapter-{number}",
                seed=number,
                config=config,
            )
            adapter = tiny_adapter(source, self.checkpoint.manifest, ranks=number + 1)
            self.adapters.append(stack.enter_context(adapter))

    @property
    def digest(self) -> str:
        return manifest_digest(self.checkpoint.manifest_json)

    def build(self, ops: Ops) -> EngineModel:
        model = build_model(
            self.checkpoint.manifest,
            self.checkpoint.map(),
            self.checkpoint.config_json,
            ops=ops,
            device=torch.device("cpu"),
            kv_blocks=32,
        )
        for adapter in self.adapters:
            attach(model, adapter, self.digest)
        return model

    def merged_logits(
        self, prompt: Sequence[int], adapter: TinyAdapter | None
    ) -> NDArray[np.float32]:
        reference = self.checkpoint.reference()
        if adapter is not None:
            merge(reference, adapter.directory)
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
        found: NDArray[np.float32] = logits.numpy()
        return found


def attach(model: EngineModel, adapter: TinyAdapter, base_digest: str) -> None:
    model.adapters.attach(
        adapter.digest,
        adapter.manifest,
        adapter.map(),
        adapter.config_json,
        base_digest=base_digest,
    )


@pytest.fixture(scope="module", params=sorted(TARGETS))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    with ExitStack() as stack:
        yield Bench(request.param, tmp_path_factory.mktemp("base"), stack)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench("llama", tmp_path_factory.mktemp("base"), stack)


def packed(rows: Sequence[tuple[Sequence[int], str]], *, start: int = 0, end: int = 99):
    """One step of whole sequences, or of the stretch of each from `start` to `end`."""
    tokens: list[int] = []
    positions: list[int] = []
    seq_index: list[int] = []
    logit_rows: list[int] = []
    groups: dict[str, tuple[list[int], list[int]]] = {}
    tables = np.zeros((len(rows), 2), dtype=np.int32)
    for row, (prompt, adapter) in enumerate(rows):
        assert len(prompt) <= 2 * BLOCK_TOKENS
        tables[row] = (2 * row, 2 * row + 1)
        places = range(start, min(end, len(prompt)))
        held = groups.setdefault(adapter, ([], []))
        held[0].extend(range(len(tokens), len(tokens) + len(places)))
        tokens += [prompt[place] for place in places]
        positions += places
        seq_index += [row] * len(places)
        if len(prompt) <= end:
            held[1].append(len(logit_rows))
            logit_rows.append(len(tokens) - 1)
    groups.pop("", None)
    return PackedStep(
        token_ids=np.array(tokens, dtype=np.int64),
        positions=np.array(positions, dtype=np.int32),
        seq_index=np.array(seq_index, dtype=np.int32),
        block_tables=tables,
        logit_rows=np.array(logit_rows, dtype=np.int64),
        adapters=tuple(
            AdapterRows(name, np.array(held[0], dtype=np.int64), np.array(held[1], dtype=np.int64))
            for name, held in groups.items()
        ),
    )


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_rows_of_a_mixed_batch_equal_the_merged_model(bench: Bench, kind: str):
    model = bench.build(NativeOps(2) if kind == "native" else TorchOps())
    first, second = bench.adapters
    asked = [(PROMPTS[0], first), (PROMPTS[1], None), (PROMPTS[2], second), (PROMPTS[3], first)]
    step = packed([(prompt, adapter.digest if adapter else "") for prompt, adapter in asked])
    found = model.forward(step)
    for row, (prompt, adapter) in zip(found, asked, strict=True):
        own = bench.merged_logits(prompt, adapter)
        assert np.abs(row - own).max() < 1e-4 * max(1.0, float(np.ptp(own)))
    plain = bench.merged_logits(PROMPTS[0], None)
    assert np.abs(found[0] - plain).max() > 0.05, "the adapter changes nothing: no test"


def test_a_row_is_the_same_bits_in_every_batch(bench: Bench):
    model = bench.build(NativeOps(2))
    first, second = (adapter.digest for adapter in bench.adapters)
    alone = model.forward(packed([(PROMPTS[0], first)]))[0]
    beside = model.forward(
        packed([(PROMPTS[2], ""), (PROMPTS[1], first), (PROMPTS[0], first), (PROMPTS[3], second)])
    )[2]
    model.forward(packed([(PROMPTS[2], second), (PROMPTS[0], first)], end=5))
    in_chunks = model.forward(packed([(PROMPTS[2], second), (PROMPTS[0], first)], start=5))[1]
    assert (alone == beside).all()
    assert (alone == in_chunks).all()


def test_rows_without_an_adapter_are_untouched(bench: Bench):
    model = bench.build(NativeOps(2))
    first, second = (adapter.digest for adapter in bench.adapters)
    mixed = packed([(PROMPTS[1], first), (PROMPTS[0], ""), (PROMPTS[3], second)])
    beside = model.forward(mixed)
    # Some families compute a step without adapters another way, once they are warm.
    for _ in range(2):
        assert (model.forward(packed([(PROMPTS[0], "")]))[0] == beside[1]).all()
        assert (model.forward(mixed) == beside).all()
    model.adapters.drop(first)
    model.adapters.drop(second)
    model.adapters.check()
    assert (model.forward(packed([(PROMPTS[0], "")]))[0] == beside[1]).all()


@pytest.mark.parametrize("arithmetic", Arithmetic)
def test_a_step_with_adapters_is_one_call_with_the_bits_of_the_stand_ins(
    tmp_path: Path, arithmetic: Arithmetic
):
    with ExitStack() as stack:
        bench = Bench("qwen3", tmp_path, stack, LAYER_TARGETS)
        model = bench.build(NativeOps(3))
        model.use(arithmetic)
        first, second = (adapter.digest for adapter in bench.adapters)
        step = packed(
            [(PROMPTS[1], first), (PROMPTS[0], ""), (PROMPTS[3], second), (PROMPTS[2], first)]
        )
        model.forward(step)
        native, model.native = model.native, None
        assert native is not None
        one_by_one = model.forward(step)
        model.native, before = native, dict(native.seconds())
        found = model.forward(step)
        assert all(spent > before[phase] for phase, spent in native.seconds().items())
        assert np.array_equal(found.view(np.int32), one_by_one.view(np.int32))
        plain = packed([(prompt, "") for prompt in (PROMPTS[1], PROMPTS[0], PROMPTS[3])])
        untouched = model.forward(plain)
        assert np.array_equal(found[1].view(np.int32), untouched[1].view(np.int32))
        assert np.abs(found[0] - untouched[0]).max() > 0.05
        model.adapters.drop(first)
        assert not native.knows(first)
        assert native.knows(second)


def test_an_adapter_on_the_head_or_the_embedding_takes_no_native_call(llama: Bench, tmp_path: Path):
    with ExitStack() as stack:
        for bench in (llama, Bench("llama-tied", tmp_path, stack)):
            model = bench.build(NativeOps(1))
            model.forward(packed([(PROMPTS[0], "")]))
            assert model.native is not None
            model.forward(packed([(PROMPTS[0], bench.adapters[0].digest)]))
            before = dict(model.native.seconds())
            model.forward(packed([(PROMPTS[0], bench.adapters[0].digest)]))
            assert dict(model.native.seconds()) == before


def test_attaching_and_dropping_in_any_order(llama: Bench):
    model = llama.build(NativeOps(1))
    first, second = llama.adapters
    for digest in (first.digest, first.digest, "unknown"):
        model.adapters.drop(digest)
        model.adapters.check()
    assert model.adapters.attached == {second.digest}
    attach(model, second, llama.digest)
    attach(model, first, llama.digest)
    model.adapters.check()
    assert model.adapters.attached == {first.digest, second.digest}


def test_a_step_without_logits_takes_an_adapter_on_the_head(llama: Bench):
    model = llama.build(NativeOps(1))
    step = packed([(PROMPTS[2], llama.adapters[0].digest)], end=6)
    assert model.forward(step).shape[0] == 0


def test_another_base_is_refused(llama: Bench):
    model = llama.build(NativeOps(1))
    adapter = llama.adapters[0]
    model.adapters.drop(adapter.digest)
    with pytest.raises(Conflict, match="other bytes"):
        attach(model, adapter, "0" * 32)
    assert adapter.digest not in model.adapters.attached


def test_a_model_is_no_adapter(llama: Bench):
    model = llama.build(NativeOps(1))
    with pytest.raises(InvalidRequest, match="not a LoRA"):
        model.adapters.attach(
            "m", llama.checkpoint.manifest, llama.checkpoint.map(), b"{}", base_digest=llama.digest
        )


def shapes_differ(adapter: TinyAdapter) -> TinyAdapter:
    entry = adapter.manifest.tensors[0]
    shape = (entry.shape[0], entry.shape[1] // 2)
    smaller = replace(entry, shape=shape, size_bytes=entry.size_bytes // 2)
    return renamed(adapter, smaller)


def lacks_its_twin(adapter: TinyAdapter) -> TinyAdapter:
    return renamed(adapter, *adapter.manifest.tensors[1:])


def is_of_no_module(adapter: TinyAdapter) -> TinyAdapter:
    entry = adapter.manifest.tensors[0]
    name = entry.name.replace("layers.0", "layers.77")
    return renamed(adapter, replace(entry, name=name), *adapter.manifest.tensors[1:])


def is_of_a_norm(adapter: TinyAdapter) -> TinyAdapter:
    entries = [
        replace(entry, name=entry.name.replace("layers.0.self_attn.q_proj", "norm"))
        for entry in adapter.manifest.tensors
    ]
    return renamed(adapter, *entries)


def is_no_factor(adapter: TinyAdapter) -> TinyAdapter:
    entry = adapter.manifest.tensors[0]
    return renamed(adapter, replace(entry, name="lm_head.weight"), *adapter.manifest.tensors[1:])


def renamed(adapter: TinyAdapter, *entries: object) -> TinyAdapter:
    return replace(adapter, manifest=replace(adapter.manifest, tensors=tuple(entries)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (shapes_differ, CorruptCheckpoint, "factors"),
        (lacks_its_twin, CorruptCheckpoint, "two factors"),
        (is_of_no_module, InvalidRequest, "no module"),
        (is_of_a_norm, InvalidRequest, "can't have"),
        (is_no_factor, CorruptCheckpoint, "no factor"),
    ],
)
def test_what_does_not_fit_attaches_nothing(
    llama: Bench, damage, error: type[GearfallError], text: str
):
    model = llama.build(NativeOps(1))
    adapter = llama.adapters[0]
    model.adapters.drop(adapter.digest)
    with pytest.raises(error, match=text):
        attach(model, damage(adapter), llama.digest)
    assert model.adapters.attached == {llama.adapters[1].digest}
    model.adapters.check()
