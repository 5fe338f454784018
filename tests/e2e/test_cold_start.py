"""Cold models: one load however many ask, an expected time instead of a 404, and scale to zero."""

import asyncio
import json
import zlib

import httpx
import pytest

from gearfall.client import AsyncClient, Waiting
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.demo import catalogue
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.etcd_state import EtcdState
from gearfall.pb import common_pb2
from tests.cluster_host import ClusterHost

REQUESTS = 500


async def register(client: AsyncClient, name: str) -> None:
    path = str(catalogue.checkpoint_path("arith-small"))
    _ = [item async for item in client.register_model(name, path)]


@pytest.fixture
async def cold_model(client: AsyncClient, request: pytest.FixtureRequest) -> str:
    name = f"cold-{zlib.crc32(request.node.name.encode()):08x}"
    await register(client, name)
    return name


async def test_500_requests_at_once_for_a_cold_model_cause_one_load(
    client: AsyncClient, host: ClusterHost, cold_model: str
) -> None:
    answers = await asyncio.gather(
        *(
            client.generate(cold_model, "2+3=", temperature=0.0, max_tokens=8)
            for _ in range(REQUESTS)
        )
    )
    assert {answer.text for answer in answers} == {"5"}
    starts = [
        line
        for line in host.log_lines("worker")
        if line.get("message") == "replica ready" and line.get("model") == cold_model
    ]
    loads = [
        line
        for line in host.log_lines("store")
        if line.get("message") == "model loaded" and line.get("model") == cold_model
    ]
    assert (len(starts), len(loads)) == (1, 1)


async def test_a_cold_model_says_how_long_it_will_take(
    client: AsyncClient, cold_model: str
) -> None:
    listed = {model.name: model for model in (await client.models()).models}
    assert listed[cold_model].readiness == common_pb2.MODEL_READINESS_COLD
    assert listed[cold_model].expected_start_s > 0
    events = [event async for event in client.stream(cold_model, "2+3=", max_tokens=8)]
    waits = [event for event in events if isinstance(event, Waiting)]
    assert waits
    assert waits[0].model == cold_model
    assert waits[0].expected_s > 0


async def test_a_cold_stream_over_rest_waits_with_comments(rest_url: str, cold_model: str) -> None:
    async with (
        httpx.AsyncClient(base_url=rest_url, timeout=60) as http,
        http.stream(
            "POST",
            "/v1/completions",
            json={"model": cold_model, "prompt": "2+3=", "stream": True, "temperature": 0},
        ) as reply,
    ):
        lines = [line async for line in reply.aiter_lines()]
    assert any(line.startswith(": waiting for") for line in lines)
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(c["text"] for d in data for c in d["choices"]) == "5"


async def test_an_idle_model_scales_to_zero_and_comes_back(
    client: AsyncClient, host: ClusterHost, cold_model: str
) -> None:
    await client.deploy(
        DeploymentRecord(
            DeploymentName(f"{cold_model}-brief"), (Stage(ModelName(cold_model)),), keep_alive_s=0.2
        )
    )
    assert (await client.generate(cold_model, "2+3=", temperature=0.0)).text == "5"
    async with asyncio.timeout(30):
        await _no_replica_of(host, cold_model)
    assert (await client.generate(cold_model, "2+3=", temperature=0.0)).text == "5"
    await client.remove_deployment(f"{cold_model}-brief")


async def _no_replica_of(host: ClusterHost, model: str) -> None:
    state = EtcdState(host.facts.etcd_url)
    cluster = Cluster(state)
    await cluster.start()
    try:
        await cluster.wait_until(
            lambda view: all(hosted != model for _, hosted in view.replicas), timeout_s=60.0
        )
    finally:
        await cluster.stop()
        await state.close()
