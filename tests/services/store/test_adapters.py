"""LoRA adapters in a store: registered under a base, leased like a model, found again."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gearfall.core.errors import Conflict, GearfallError, InvalidRequest, NotFound
from gearfall.core.ids import ModelName
from gearfall.core.records import ModelRecord
from gearfall.pb import store_pb2 as pb
from tests.gearfall.checkpoint.conversions import LLAMA, llama_weights, save_source
from tests.gearfall.checkpoint.test_adapter_source import CONFIG, convert_adapter, factors
from tests.services.store.stores import TIMEOUT_S, RunningStore, collect, running_store


def adapter_at(directory: Path, told: str = "", **config: Any) -> Path:
    directory.mkdir()
    save_file(factors(), directory / "adapter_model.safetensors")
    content = CONFIG | {"base_model_name_or_path": told} | config
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


async def register(store: RunningStore, name: str, path: Path | str, base: str = "") -> ModelRecord:
    request = pb.RegisterModelRequest(name=name, path=str(path), base=base)
    await collect(store.stub.RegisterModel(request, timeout=TIMEOUT_S))
    return await store.wait_model(name, (store.node_id,))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("base") / "source", llama_weights(), LLAMA)


@pytest.fixture
async def store(tmp_path: Path, source: Path) -> AsyncIterator[RunningStore]:
    async with running_store(tmp_path / "store") as store:
        await register(store, "base", source)
        yield store


@pytest.mark.parametrize("way", ["named", "told its name", "told its directory"])
async def test_an_adapter_is_registered_under_its_base(
    store: RunningStore, source: Path, tmp_path: Path, way: str
):
    told = {"told its name": "base", "told its directory": str(source)}.get(way, "hub/elsewhere")
    path = adapter_at(tmp_path / "adapter", told)
    record = await register(store, "tuned", path, "base" if way == "named" else "")
    base = store.cluster.view.models[ModelName("base")]
    assert (record.base, record.base_digest) == ("base", base.digest)
    assert record.context_tokens == base.context_tokens
    assert (base.base, base.base_digest) == ("", "")
    lease = await store.lease("tuned")
    assert sum(lease.partition_sizes) == record.size_bytes
    lease.close()
    reply = await store.call(
        "ReadFile", pb.ReadFileRequest(model="tuned", file="adapter_config.json")
    )
    assert json.loads(reply.content)["r"] == CONFIG["r"]


async def test_a_converted_adapter_below_a_url_finds_its_base_by_digest(
    store: RunningStore, source: Path, tmp_path: Path
):
    base = store.service.ssd.models[ModelName("base")]
    adapter_at(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", base.manifest, tmp_path / "converted", digest=base.digest)
    url = (tmp_path / "converted").as_uri()
    record = await register(store, "tuned", url)
    assert (record.base, record.base_digest) == ("base", base.digest)
    lease = await store.lease("tuned")
    lease.close()
    assert store.service.ssd.models[ModelName("tuned")].base == "base"


async def test_a_store_finds_its_adapters_again(source: Path, tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        await register(store, "base", source)
        await register(store, "tuned", adapter_at(tmp_path / "adapter"), "base")
    async with running_store(tmp_path / "store") as store:
        record = await store.wait_model("tuned", (store.node_id,))
        assert record.base == "base"


async def test_an_adapter_has_no_canary(store: RunningStore, tmp_path: Path):
    await register(store, "tuned", adapter_at(tmp_path / "adapter"), "base")
    with pytest.raises(InvalidRequest, match="no canary"):
        await store.call("ReadCanary", pb.ReadCanaryRequest(model="tuned"))


async def with_another_base(store: RunningStore, home: Path) -> tuple[Path | str, str]:
    weights = {
        name: torch.cat([tensor, tensor]) if tensor.dim() == 2 else tensor
        for name, tensor in llama_weights().items()
    }
    wide = save_source(home / "wide", weights, LLAMA)
    await register(store, "wide", wide)
    return adapter_at(home / "adapter"), "wide"


async def of_other_bytes(store: RunningStore, home: Path) -> tuple[Path | str, str]:
    base = store.service.ssd.models[ModelName("base")]
    convert_adapter(adapter_at(home / "adapter"), base.manifest, home / "converted")
    return (home / "converted").as_uri(), "base"


async def of_an_unknown_digest(store: RunningStore, home: Path) -> tuple[Path | str, str]:
    return (await of_other_bytes(store, home))[0], ""


async def of_nothing(store: RunningStore, home: Path) -> tuple[Path | str, str]:
    return adapter_at(home / "adapter", "hub/elsewhere"), ""


async def of_an_unknown_model(store: RunningStore, home: Path) -> tuple[Path | str, str]:
    return adapter_at(home / "adapter"), "nobody"


async def of_an_adapter(store: RunningStore, home: Path) -> tuple[Path | str, str]:
    await register(store, "first", adapter_at(home / "first"), "base")
    return adapter_at(home / "adapter"), "first"


async def a_model_with_a_base(store: RunningStore, home: Path) -> tuple[Path | str, str]:
    return save_source(home / "model", llama_weights(), LLAMA), "base"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (with_another_base, InvalidRequest, "does not fit"),
        (of_other_bytes, Conflict, "other bytes"),
        (of_an_unknown_digest, InvalidRequest, "base"),
        (of_nothing, InvalidRequest, "say which model"),
        (of_an_unknown_model, NotFound, "nobody"),
        (of_an_adapter, InvalidRequest, "must be a model"),
        (a_model_with_a_base, InvalidRequest, "adapter_config.json"),
    ],
)
async def test_what_has_no_base_is_refused_and_leaves_nothing(
    store: RunningStore, tmp_path: Path, make: Any, error: type[GearfallError], text: str
):
    path, base = await make(store, tmp_path)
    with pytest.raises(error, match=text):
        await register(store, "tuned", path, base)
    assert ModelName("tuned") not in store.cluster.view.models
    assert ModelName("tuned") not in store.service.ssd.models
    await register(store, "good", adapter_at(tmp_path / "good"), "base")
