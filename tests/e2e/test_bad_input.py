"""Bad input by every door: a clear error in OpenAI's shape, and the cluster answers afterwards."""

import json
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from gearfall.client import AsyncClient
from gearfall.core.errors import CorruptCheckpoint, GearfallError, InvalidRequest
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.demo import catalogue

pytestmark = pytest.mark.usefixtures("demo_family")


@pytest.fixture
async def http(rest_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=rest_url, timeout=30) as opened:
        yield opened
        alive = await opened.post(
            "/v1/completions",
            json={"model": "arith-large", "prompt": "2+2=", "temperature": 0, "max_tokens": 8},
        )
        assert alive.json()["choices"][0]["text"] == "4"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "arith", "messages": [{"role": "user", "content": "1+1"}]} | fields


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "no-such-model"}, 404, "model"),
        ({"model": 7}, 400, "model"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, None),
        ({"n": 10**9}, 400, "n"),
        ({"n": 0}, 400, "n"),
        ({"max_tokens": -5}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"temperature": 9}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"stop": ["x"] * 99}, 400, "stop"),
        ({"stream": "perhaps"}, 400, "stream"),
        ({"seed": "x"}, 400, "seed"),
        ({"top_logprobs": 99, "logprobs": True}, 400, "top_logprobs"),
    ],
)
async def test_a_wrong_field_is_named(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str | None
) -> None:
    reply = await http.post("/v1/chat/completions", json=chat(**fields))
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"\xff\xfe", b'{"model": "arith"', b"null"])
async def test_malformed_json_is_refused(http: httpx.AsyncClient, body: bytes) -> None:
    reply = await http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


async def test_a_prompt_of_10_mb_is_refused(http: httpx.AsyncClient) -> None:
    body = json.dumps(chat(messages=[{"role": "user", "content": "1" * 10_000_000}]))
    reply = await http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code in (400, 413)
    assert reply.json()["error"]["message"]


async def test_a_prompt_over_the_context_is_refused(http: httpx.AsyncClient) -> None:
    reply = await http.post(
        "/v1/completions", json={"model": "arith-large", "prompt": "1" * 100_000}
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


async def test_unknown_paths_and_methods_have_the_same_shape(http: httpx.AsyncClient) -> None:
    for reply in (await http.get("/v1/nothing"), await http.get("/v1/chat/completions")):
        assert reply.status_code in (404, 405)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def _copy_of_small(directory: Path) -> Path:
    directory.mkdir()
    for file in catalogue.checkpoint_path("arith-small").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def truncated(directory: Path) -> Path:
    file = _copy_of_small(directory) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return directory


def huge_header(directory: Path) -> Path:
    file = _copy_of_small(directory) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])
    return directory


def pickle_only(directory: Path) -> Path:
    (_copy_of_small(directory) / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return directory


def no_config(directory: Path) -> Path:
    (_copy_of_small(directory) / "config.json").unlink()
    return directory


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (truncated, CorruptCheckpoint),
        (huge_header, CorruptCheckpoint),
        (pickle_only, InvalidRequest),
        (no_config, InvalidRequest),
    ],
)
async def test_a_bad_model_directory_is_refused(
    client: AsyncClient,
    http: httpx.AsyncClient,
    tmp_path: Path,
    make: Any,
    kind: type[GearfallError],
) -> None:
    directory = make(tmp_path / "model")
    with pytest.raises(kind):
        _ = [item async for item in client.register_model("bad-model", str(directory))]
    assert "bad-model" not in {model.name for model in (await client.models()).models}


@pytest.mark.parametrize("name", ["../escape", "a/b", "", "UPPER", "x" * 200])
async def test_a_name_that_leaves_its_folder_is_refused(
    client: AsyncClient, http: httpx.AsyncClient, name: str
) -> None:
    path = str(catalogue.checkpoint_path("arith-small"))
    with pytest.raises(InvalidRequest):
        _ = [item async for item in client.register_model(name, path)]


@pytest.mark.parametrize("path", ["relative/path", "/no/such/directory", "/etc/hostname", ""])
async def test_a_path_that_is_no_directory_is_refused(
    client: AsyncClient, http: httpx.AsyncClient, path: str
) -> None:
    with pytest.raises(InvalidRequest):
        _ = [item async for item in client.register_model("fine-name", path)]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_replicas": 1, "min_replicas": 2}, "raise the one or lower the other"),
        ({"stages": (Stage(ModelName("arith")),)}, "is a deployment"),
        ({"labels": {"planet": "mars"}}, "no live worker"),
        ({"accelerators": 9}, "has the most with"),
        ({"keep_alive_s": float("nan")}, "number of seconds"),
    ],
)
async def test_a_deployment_that_can_not_run_is_refused(
    client: AsyncClient, fields: dict[str, Any], says: str
) -> None:
    good = DeploymentRecord(DeploymentName("bad"), (Stage(ModelName("arith-large")),))
    with pytest.raises(InvalidRequest, match=says):
        await client.deploy(replace(good, **fields))
    assert "bad" not in {each.name for each in (await client.models()).deployments}
