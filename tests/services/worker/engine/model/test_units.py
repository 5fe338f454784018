"""A model that computes while its bytes arrive is the model that was built over all of them."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from gearfall.core.errors import CorruptCheckpoint, Unavailable
from gearfall.core.generation.canary import parse_canary
from services.worker.engine.model.engine_model import EngineModel, build_model
from services.worker.engine.model.ops import NativeOps
from services.worker.engine.model.units import Gate
from services.worker.engine.starting.canary import run_canary
from tests.services.worker.tiny_checkpoints import TinyCheckpoint, random_model, tiny_checkpoint

BLOCKS = 8
PROMPT = [5, 9, 1, 33, 20]


class Trickle:
    """Memory of NaNs into which a partition's bytes come when they are waited for, no sooner."""

    def __init__(self, checkpoint: TinyCheckpoint, *, lost_from: float = 1.0) -> None:
        """Bytes behind `lost_from` of a partition never come."""
        self._whole = checkpoint.map()
        self.memories = [bytearray(b"\xff") * len(whole) for whole in self._whole]
        self._there = [0] * len(self._whole)
        self._lost_from = lost_from
        self.waits: list[int] = []

    @property
    def is_complete(self) -> bool:
        return all(
            bytes(memory[:there]) == whole[:there] and there > 0
            for memory, whole, there in zip(self.memories, self._whole, self._there, strict=True)
        )

    def wait(self, ends_bytes: Mapping[int, int]) -> None:
        for partition, end in ends_bytes.items():
            if end > self._lost_from * len(self._whole[partition]):
                raise Unavailable("the load was given up")
            there = max(end, self._there[partition])
            self.memories[partition][:there] = self._whole[partition][:there]
            self._there[partition] = there
        self.waits.append(sum(self._there))


@pytest.fixture(
    scope="module", params=["llama", "llama-tied", "gpt2", "gemma2", "opt", "qwen3", "gpt_neox"]
)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    with tiny_checkpoint(random_model(request.param), directory) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    with tiny_checkpoint(random_model("llama"), directory, ranks=2) as checkpoint:
        yield checkpoint


def build(checkpoint: TinyCheckpoint, trickle: Trickle | None = None) -> EngineModel:
    return build_model(
        checkpoint.manifest,
        checkpoint.map() if trickle is None else trickle.memories,
        checkpoint.config_json,
        ops=NativeOps(1),
        device=torch.device("cpu"),
        kv_blocks=BLOCKS,
        arrival=trickle,
    )


def modules_of(model: EngineModel) -> list[torch.nn.Module]:
    return list(model._model.modules())


def own_logits(model: EngineModel) -> np.ndarray:
    return model.reference_logits(PROMPT)


def start(model: EngineModel, checkpoint: TinyCheckpoint) -> None:
    run_canary(model, parse_canary(checkpoint.canary_json))
    model.finish()


def test_the_first_pass_furnishes_as_bytes_come_and_leaves_no_gate(checkpoint):
    trickle = Trickle(checkpoint)
    model = build(checkpoint, trickle)
    gates = sum(isinstance(module, Gate) for module in modules_of(model))
    assert gates > 3  # each layer, and what stands around them
    before = len(trickle.waits)
    run_canary(model, parse_canary(checkpoint.canary_json))
    assert len(trickle.waits) >= before + gates - 1
    assert trickle.waits[before] < trickle.waits[-1]
    model.finish()
    assert trickle.is_complete
    assert not any(isinstance(module, Gate) for module in modules_of(model))
    whole = build(checkpoint)
    assert [type(module) for module in modules_of(model)] == [
        type(module) for module in modules_of(whole)
    ]
    run_canary(whole, parse_canary(checkpoint.canary_json))
    assert np.array_equal(own_logits(model), own_logits(whole))


def test_tensors_gathered_from_several_partitions_wait_for_all_of_them(sharded):
    trickle = Trickle(sharded)
    model = build(sharded, trickle)
    run_canary(model, parse_canary(sharded.canary_json))
    model.finish()
    whole = build(sharded)
    run_canary(whole, parse_canary(sharded.canary_json))
    assert np.array_equal(own_logits(model), own_logits(whole))


def test_what_no_pass_has_called_is_furnished_at_the_end(checkpoint):
    model = build(checkpoint, Trickle(checkpoint))
    model.finish()
    assert not any(parameter.is_meta for parameter in model._model.parameters())
    run_canary(model, parse_canary(checkpoint.canary_json))


@pytest.mark.parametrize("lost_from", [0.0, 0.3, 0.6, 0.9])
def test_a_load_that_fails_ends_the_pass_with_its_error(checkpoint, lost_from):
    model = build(checkpoint, Trickle(checkpoint, lost_from=lost_from))
    with pytest.raises(Unavailable, match="given up"):
        start(model, checkpoint)


def test_a_checkpoint_of_another_model_is_refused_before_a_byte_is_there(checkpoint, sharded):
    trickle = Trickle(sharded, lost_from=0.0)
    config = sharded.config_json.replace(b'"intermediate_size": 112', b'"intermediate_size": 64')
    with pytest.raises(CorruptCheckpoint, match="has shape"):
        build_model(
            sharded.manifest,
            trickle.memories,
            config,
            ops=NativeOps(1),
            device=torch.device("cpu"),
            kv_blocks=BLOCKS,
            arrival=trickle,
        )
    assert trickle.waits == []
