"""A whole cluster whose workers run vLLM itself: what clients see of it, moves and crashes."""

import asyncio
import importlib.util
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from gearfall.client import AsyncClient, Finished, TextDelta
from gearfall.client.request import Options
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.demo import catalogue
from gearfall.infra.failpoints import DIRECTORY_VARIABLE
from gearfall.pb import common_pb2
from tests.cluster_host import ClusterHost, kill
from tests.e2e.test_migration import BY_TOKENS, MODEL, PROMPT_IDS, Pair, wanderer
from tests.services.worker.engine.vllm_processes import descendants, name_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed: docs/protocol.md says how to run these",
    ),
    pytest.mark.timeout(600),
]

TOKENS = 800
START_TIMEOUT_S = 300
GREEDY = Options(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=True)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ClusterHost, Path]]:
    folder = tmp_path_factory.mktemp("vllm")
    wanderer().float().save_pretrained(folder / "source")
    shutil.copy(catalogue.checkpoint_path("arith-small") / "tokenizer.json", folder / "source")
    points = tmp_path_factory.mktemp("points")
    environment = {"GEARFALL_ENGINE": "vllm", DIRECTORY_VARIABLE: str(points)}
    host = ClusterHost(folder / "home", "--workers-per-node", "2", environment=environment)
    yield host, folder / "source"
    assert host.stop() == 0


@pytest.fixture
async def pair(two_workers: tuple[ClusterHost, Path]) -> AsyncIterator[Pair]:
    host, source = two_workers
    async with AsyncClient(host.addresses["grpc"]) as client:
        _ = [item async for item in client.register_model(MODEL, str(source))]
        stages = (Stage(ModelName(MODEL)),)
        await client.deploy(
            DeploymentRecord(DeploymentName("pair"), stages, min_replicas=2, max_replicas=2)
        )
        pair = Pair(client, host)
        await client.generate(MODEL, PROMPT_IDS, temperature=0.0, max_tokens=1)  # waits for one
        async with asyncio.timeout(START_TIMEOUT_S):
            while len(pair.addresses) < 2:
                pair.addresses = {
                    worker.worker_id: worker.address
                    for worker in (await client.status()).workers
                    if any(each.state == common_pb2.REPLICA_STATE_READY for each in worker.replicas)
                }
        yield pair


async def test_a_moved_answer_is_the_undisturbed_one(pair: Pair) -> None:
    expected_ids, expected_text, owners, _ = await pair.read((), GREEDY)
    assert (len(expected_ids), owners) == (TOKENS, 1)
    ids, text, owners, (reply,) = await pair.read(((10, BY_TOKENS),), GREEDY)
    assert (ids, text) == (expected_ids, expected_text)
    assert (owners, reply.path) == (2, BY_TOKENS)


async def test_rest_streams_stops_at_strings_and_tells_alternatives(pair: Pair) -> None:
    url = f"http://{pair.host.addresses['rest']}/v1/completions"
    asked = {"model": MODEL, "prompt": "12+34=", "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=60) as rest:
        whole = (await rest.post(url, json=asked | {"max_tokens": 40, "logprobs": 3})).json()
        text = whole["choices"][0]["text"]
        top = whole["choices"][0]["logprobs"]["top_logprobs"]
        assert len(top) == 40
        assert all(len(each) == 3 for each in top)
        stop = text[20:22]
        stopped = (await rest.post(url, json=asked | {"max_tokens": 40, "stop": stop})).json()
    (choice,) = stopped["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


async def test_a_client_that_goes_ends_the_work(pair: Pair) -> None:
    async for event in pair.client.stream(MODEL, PROMPT_IDS, **GREEDY):
        if isinstance(event, TextDelta):
            break
    async with asyncio.timeout(30):
        while await is_busy(pair.client):
            pass


async def test_vllm_killed_in_mid_answer_costs_a_pause_not_a_token(pair: Pair) -> None:
    expected_ids, expected_text, *_ = await pair.read((), GREEDY)
    ids: list[int] = []
    text, owners, busy = "", 0, ""
    async for event in pair.client.stream(MODEL, PROMPT_IDS, **GREEDY):
        if isinstance(event, TextDelta):
            text += event.text
            ids += [item.token_id for item in event.logprobs]
            if not busy and len(ids) >= 20:
                busy = await pair.find_busy()
                kill(_core_below(pair.host, busy))
        elif isinstance(event, Finished):
            owners = event.stages[-1].epochs
    assert (ids, text) == (expected_ids, expected_text)
    assert owners > 1


async def is_busy(client: AsyncClient) -> bool:
    workers = (await client.status()).workers
    return any(replica.running_jobs for worker in workers for replica in worker.replicas)


def _core_below(host: ClusterHost, address: str) -> int:
    """The process in which vLLM computes for the worker at `address`."""
    (worker,) = (facts for facts in host.facts.services if facts.address == address)
    (core,) = (pid for pid in descendants(worker.pid) if "EngineCore" in name_of(pid))
    return core
