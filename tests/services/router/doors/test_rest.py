"""The REST door on a real uvicorn: the official client, streams, errors in OpenAI's shape."""

import asyncio
import json
from dataclasses import replace

import httpx
import openai
import pytest

from gearfall.client import AsyncClient
from gearfall.core.certainty.escalation import EscalationPolicy, WhileLoading
from gearfall.core.generation.job import FinishReason
from services.router.service import RouterLimits
from tests.services.router.rig import Answer, running_rig

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"


def chat(**fields: object) -> dict[str, object]:
    return {"model": "small", "messages": [{"role": "user", "content": "hi"}], **fields}


async def test_chat_with_the_official_client(rig, client):
    worker = rig.worker(small=Answer("hello", cached_tokens=3))
    answer = await client.chat.completions.create(
        model="small",
        messages=[
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
            },
        ],
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=50,
        seed=-1,
        extra_body={"ignore_eos": False, "top_k": 5, "unknown": {"fields": "are fine"}},
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("hello", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.gearfall["stages"][0]["cached_tokens"] == 3
    assert answer._request_id == answer.gearfall["request_id"]
    assert [token.token for token in choice.logprobs.content] == list("hello")
    assert [top.token for top in choice.logprobs.content[0].top_logprobs] == ["h", "z"]
    assert choice.logprobs.content[0].bytes == [ord("h")]
    (job,) = worker.jobs
    assert (job.sampling.seed, job.sampling.top_k, job.sampling.max_tokens) == (2**64 - 1, 5, 50)
    prompt = rig.files.files and "s:be brief;u:hi;a:"
    assert len(job.prompt_token_ids) == 1 + len(prompt)


async def test_chat_stream_with_the_official_client(rig, client):
    rig.worker(small=Answer("hello"))
    stream = await client.chat.completions.create(
        **chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-1].model_extra["gearfall"]["model"] == "small"


async def test_completions_of_several_prompts(rig, client):
    rig.worker(small=Answer("hello"))
    answer = await client.completions.create(
        model="small", prompt=["hi", "you"], n=2, logprobs=1, stop=["lo"]
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {"hel"}
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == list("hel")
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[0] == pytest.approx({"h": -0.1})
    assert answer.usage.prompt_tokens == 3 + 4


async def test_completions_stream_of_token_ids(rig, client):
    rig.worker(small=Answer("hello"))
    stream = await client.completions.create(model="small", prompt=[5, 6], n=2, stream=True)
    texts = {0: "", 1: ""}
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "hello", 1: "hello"}


async def test_headers_and_field_tell_the_cascade(rig, http):
    rig.worker(small=Answer("wrong", logprob=-1.0), large=Answer("right"))
    reply = await http.post(CHAT, json=chat(model="both"), headers={"x-request-id": "mine"})
    assert reply.headers["x-gearfall-model"] == "large"
    assert reply.headers["x-gearfall-stages"] == "small,large"
    assert reply.headers["x-gearfall-request-id"] == "mine"
    assert float(reply.headers["x-gearfall-cost-flops"]) > 0
    assert float(reply.headers["x-gearfall-device-s"]) == 0, "this worker does not say"
    told = reply.json()["gearfall"]
    assert [stage["accepted"] for stage in told["stages"]] == [False, True]
    assert told["stages"][0]["certainty"] < told["stages"][0]["threshold"] == 0.5
    assert told["cost_flops"] == sum(stage["cost_flops"] for stage in told["stages"])


async def test_an_answer_that_is_given_again_looks_the_same(rig, http):
    kept = replace(rig.cluster.view.deployments["both"], cache_bytes=1 << 20)
    await rig.cluster.wait_seen(await rig.cluster.put_deployment(kept))
    worker = rig.worker(small=Answer("hello", logprob=-0.01))
    asked = chat(model="both", temperature=0, logprobs=True)
    first, again = [await http.post(CHAT, json=asked) for _ in range(2)]
    assert [each.headers["x-gearfall-cache"] for each in (first, again)] == ["miss", "hit"]
    assert again.json()["choices"] == first.json()["choices"]
    usage = again.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    assert {**usage, "prompt_tokens_details": None} == {
        **first.json()["usage"],
        "prompt_tokens_details": None,
    }
    said = again.json()["gearfall"]
    assert (said["cache"], said["cost_flops"], said["model"]) == ("hit", 0, "small")
    assert "x-gearfall-cache" not in (await http.post(CHAT, json=chat())).headers

    def texts(reply: httpx.Response) -> tuple[str, str]:
        lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        text = "".join(each["delta"].get("content", "") for each in choices)
        return text, choices[-1]["finish_reason"]

    streams = [await http.post(CHAT, json={**asked, "stream": True}) for _ in range(2)]
    assert [each.headers["x-gearfall-cache"] for each in streams] == ["hit", "hit"]
    assert [texts(each) for each in streams] == [("hello", "stop")] * 2
    assert all(each.text.endswith("data: [DONE]\n\n") for each in streams)
    assert len(worker.jobs) == 2


async def test_a_degraded_answer_says_so_whole_and_streamed(rig, http):
    await rig.add_model("cold", ready=False)
    policy = EscalationPolicy(WhileLoading.ANSWER)
    await rig.deploy("flagged", ("small", 0.5), ("cold", None), escalation=policy)
    rig.worker(small=Answer("unsure", logprob=-1.0))
    reply = await http.post(CHAT, json=chat(model="flagged"))
    assert reply.headers["x-gearfall-degraded"] == "loading"
    assert reply.json()["gearfall"]["degraded"] == "loading"
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    stream = await http.post(CHAT, json=chat(model="flagged", stream=True))
    data = [json.loads(line[6:]) for line in stream.text.splitlines() if line[6:7] == "{"]
    assert data[-1]["gearfall"]["degraded"] == "loading"
    certain = await http.post(CHAT, json=chat())
    assert "x-gearfall-degraded" not in certain.headers
    assert certain.json()["gearfall"]["degraded"] is None


async def test_a_cold_model_streams_comments_while_it_waits(rig, http):
    await rig.add_model("cold", ready=False)
    async with http.stream("POST", CHAT, json=chat(model="cold", stream=True)) as reply:
        assert reply.status_code == 200
        assert float(reply.headers["x-gearfall-expected-start-s"]) > 0
        lines = reply.aiter_lines()
        assert (await anext(lines)).startswith(": waiting for cold, expected ")
        rig.worker(cold=Answer("hello"))
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["gearfall"]["model"] == "cold"


async def test_a_streaming_client_that_leaves_stops_the_work(rig, http):
    worker = rig.worker(small=Answer("hello"))
    worker.hold_at = 2
    async with http.stream("POST", CHAT, json=chat(stream=True)) as reply:
        await anext(reply.aiter_lines())
        await worker.held.wait()
    async with asyncio.timeout(5):
        await worker.replied.wait()
    assert worker.stops


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_anything_came_stops_the_work(rig, http, stream):
    worker = rig.worker(small=Answer("hello"))
    worker.hold_at = 0
    asking = asyncio.create_task(http.post(CHAT, json=chat(stream=stream)))
    await worker.held.wait()
    asking.cancel()
    async with asyncio.timeout(5):
        await worker.replied.wait()
    assert worker.stops


async def test_an_error_in_mid_stream_is_an_event(rig, http):
    failing = Answer("he", finish=FinishReason.ERROR, error="engine says no")
    rig.worker(small=failing)
    reply = await http.post(CHAT, json=chat(stream=True))
    lines = [line for line in reply.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert "engine says no" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]


async def test_models(rig, client):
    await rig.add_model("cold", ready=False)
    listed = {model.id: model.model_extra["gearfall"] async for model in client.models.list()}
    assert listed.keys() == {"small", "large", "cold", "both"}
    assert listed["both"]["stages"] == ["small", "large"]
    assert listed["small"]["readiness"] == "ready"
    assert listed["cold"]["readiness"] == "cold"
    assert listed["cold"]["expected_start_s"] > 0
    assert (await client.models.retrieve("both")).id == "both"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody")


async def test_health_and_metrics(rig, http):
    rig.worker(small=Answer("hello"))
    await http.post(CHAT, json=chat())
    assert (await http.get("/healthz")).status_code == 200
    assert (await http.get("/readyz")).status_code == 200
    text = (await http.get("/metrics")).text
    assert 'gearfall_requests_total{model="small",outcome="finished"} 1.0' in text
    assert 'gearfall_time_to_first_token_seconds_count{model="small"} 1.0' in text
    assert 'gearfall_queue_depth{model="small",state="waiting"} 0.0' in text
    assert "_created" not in text
    assert 'gearfall_reachable{part="state"} 1.0' in text
    assert 'gearfall_reachable{part="queue"} 1.0' in text


async def test_a_queue_that_is_away_is_told(rig, http):
    rig.queue_server.stop()
    reply = await http.get("/readyz")
    assert reply.status_code == 503
    assert "queue" in reply.json()["degraded"][0]
    text = (await http.get("/metrics")).text
    assert 'gearfall_reachable{part="state"} 1.0' in text
    assert 'gearfall_reachable{part="queue"} 0.0' in text
    rig.queue_server.start()


async def test_a_router_that_stops_is_not_ready_while_it_ends_what_runs():
    limits = RouterLimits(stop_grace_s=20.0)
    async with running_rig(limits=limits) as rig:
        await rig.add_model("small")
        worker = rig.worker(small=Answer("hello"))
        worker.hold_at = 2
        async with httpx.AsyncClient(base_url=f"http://{rig.router.rest_address}") as http:
            asking = asyncio.create_task(http.post(CHAT, json=chat()))
            await rig.until(lambda: bool(worker.jobs))
            stopping = asyncio.create_task(rig.router.service.stop())
            await rig.until(lambda: rig.router.service.is_stopping)
            reply = await http.get("/readyz")
            assert (reply.status_code, reply.json()["degraded"]) == (
                503,
                ["this router is stopping"],
            )
            assert (await http.post(CHAT, json=chat())).status_code == 429
            worker.gate.set()
            await stopping
            assert (await asking).json()["choices"][0]["message"]["content"] == "hello"


async def test_the_api_is_described(rig, http):
    described = (await http.get("/openapi.json")).json()
    assert "ChatBody" in described["components"]["schemas"]
    assert (await http.get("/docs")).status_code == 200


async def test_holders_of_two_keys_are_two_tenants_by_either_door():
    longest = "t" * 128
    async with running_rig(api_keys=("one", "two")) as rig:
        await rig.add_model("small")
        worker = rig.worker(small=Answer("fine"))
        async with httpx.AsyncClient(base_url=f"http://{rig.router.rest_address}") as http:
            for key in ("one", "two"):
                headers = {"authorization": f"Bearer {key}"}
                for claimed in ("", longest):
                    body = chat(tenant=claimed)
                    assert (await http.post(CHAT, json=body, headers=headers)).status_code == 200
        for key in ("one", "two"):
            async with AsyncClient(rig.router.grpc_address, api_key=key) as client:
                for claimed in ("", longest):
                    await client.generate("small", "hi", tenant=claimed)
        tenants = [job.tenant for job in worker.jobs]
        assert tenants[:4] == tenants[4:]
        assert len(set(tenants)) == 4


async def test_api_keys():
    async with running_rig(api_keys=("one", "two")) as rig:
        await rig.add_model("small")
        async with httpx.AsyncClient(base_url=f"http://{rig.router.rest_address}") as http:
            for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}):
                reply = await http.get("/v1/models", headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["code"] == "invalid_api_key"
            good = {"authorization": "Bearer two"}
            assert (await http.get("/v1/models", headers=good)).status_code == 200
            assert (await http.get("/healthz")).status_code == 200
