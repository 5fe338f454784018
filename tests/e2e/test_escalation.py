"""A cascade whose large model is cold: the small one answers, flagged, until the large one is up.

And what a request is charged for is what engines took.
"""

import asyncio

import httpx
import pytest

from gearfall.client import AsyncClient
from gearfall.core.certainty.escalation import Degraded, EscalationPolicy, WhileLoading
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, ReplicaState, Stage
from gearfall.demo import catalogue
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.etcd_state import EtcdState
from tests.cluster_host import ClusterHost
from tests.gearfall.infra.metric_samples import Samples, samples_of

SMALL, LARGE, BOTH = "flagged-small", "flagged-large", "flagged"


@pytest.fixture
async def cascade(client: AsyncClient) -> str:
    """Its small model is warm and never certain enough."""
    for name in (SMALL, LARGE):
        path = str(catalogue.checkpoint_path("arith-small"))
        _ = [item async for item in client.register_model(name, path)]
    await client.generate(SMALL, "2+3=", temperature=0.0, max_tokens=8)
    await client.deploy(
        DeploymentRecord(
            DeploymentName(BOTH),
            (Stage(ModelName(SMALL), 1.0), Stage(ModelName(LARGE))),
            escalation=EscalationPolicy(WhileLoading.ANSWER),
        )
    )
    return BOTH


async def test_the_small_model_answers_flagged_until_the_large_one_is_up(
    client: AsyncClient, host: ClusterHost, rest_url: str, cascade: str
) -> None:
    first = (await client.generate(cascade, "2+3=", temperature=0.0, max_tokens=8)).choices[0]
    assert (first.text, first.model, first.degraded) == ("5", SMALL, Degraded.LOADING)
    assert first.finish.value == "stop"
    assert first.usage.start_s > 0, "it caused the large model's start"

    async with asyncio.timeout(30):
        await _ready(host, LARGE)
    body = {"model": cascade, "prompt": "2+3=", "temperature": 0, "max_tokens": 8}
    async with httpx.AsyncClient(base_url=rest_url, timeout=30) as http:
        reply = await http.post("/v1/completions", json=body)
        router = samples_of((await http.get("/metrics")).text)
    described = reply.json()["gearfall"]
    assert (described["model"], described["degraded"]) == (LARGE, None)
    assert "x-gearfall-degraded" not in reply.headers
    assert [stage["model"] for stage in described["stages"]] == [SMALL, LARGE]
    assert described["device_s"] == pytest.approx(sum(s["device_s"] for s in described["stages"]))
    assert router["gearfall_degraded_answers_total", BOTH, "loading"] == 1


async def test_what_requests_were_charged_is_what_engines_took(
    client: AsyncClient, host: ClusterHost, rest_url: str, cascade: str
) -> None:
    answers = await asyncio.gather(
        *(client.generate(SMALL, f"{n}+3=", temperature=0.0, max_tokens=8) for n in range(64))
    )
    charged_s, busy_s = _charged_s(rest_url), _busy_s(host)
    assert all(answer.choices[0].usage.device_s > 0 for answer in answers)
    # Less by what the last steps took behind their tokens, and by no more than that.
    assert 0.5 * busy_s < charged_s <= busy_s


def _busy_s(host: ClusterHost) -> float:
    reply = httpx.get(f"http://{host.service('worker').metrics}/metrics")
    return _total(samples_of(reply.text), "gearfall_worker_step_seconds_sum", SMALL)


def _charged_s(rest_url: str) -> float:
    samples = samples_of(httpx.get(f"{rest_url}/metrics").text)
    return _total(samples, "gearfall_device_seconds_total", SMALL)


def _total(samples: Samples, name: str, model: str) -> float:
    return sum(value for key, value in samples.items() if key[0] == name and model in key)


async def _ready(host: ClusterHost, model: str) -> None:
    state = EtcdState(host.facts.etcd_url)
    cluster = Cluster(state)
    await cluster.start()
    try:
        await cluster.wait_until(
            lambda view: any(
                each.model == model and each.state is ReplicaState.READY
                for each in view.replicas.values()
            ),
            timeout_s=60.0,
        )
    finally:
        await cluster.stop()
        await state.close()
