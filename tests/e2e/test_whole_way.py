"""One request through all four services, on the demo's trained models, by every public door."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openai import AsyncOpenAI

from gearfall.client import AsyncClient, TextDelta
from gearfall.demo import catalogue
from gearfall.demo.arithmetic import Question
from gearfall.infra.net.grpc_channels import open_channel
from tests.cluster_host import ClusterHost

pytestmark = pytest.mark.usefixtures("demo_family")

EASY = (("12+30", "42"), ("7+8", "15"), ("90-30", "60"))


@pytest.mark.parametrize(("question", "answer"), EASY)
async def test_the_cascade_answers_over_grpc(
    client: AsyncClient, question: str, answer: str
) -> None:
    reply = await client.generate("arith", [{"role": "user", "content": question}], temperature=0.0)
    assert reply.text.strip() == answer
    stages = reply.choices[0].stages
    assert [stage.is_accepted for stage in stages] == [False] * (len(stages) - 1) + [True]
    assert reply.model == stages[-1].model
    assert reply.choices[0].usage.cost_flops == pytest.approx(
        sum(stage.cost_flops for stage in stages)
    )
    for stage in stages[:-1]:
        assert stage.certainty is not None
        assert stage.threshold is not None
        assert stage.certainty < stage.threshold


async def test_the_openai_client_gets_the_same_text_with_and_without_streaming(
    rest_url: str,
) -> None:
    async with AsyncOpenAI(base_url=f"{rest_url}/v1", api_key="none", max_retries=0) as openai:
        whole = await openai.chat.completions.create(
            model="arith", messages=[{"role": "user", "content": "123456+654321"}], temperature=0
        )
        stream = await openai.chat.completions.create(
            model="arith",
            messages=[{"role": "user", "content": "123456+654321"}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    extra = (whole.model_extra or {})["gearfall"]
    assert extra["model"] in catalogue.checkpoint_paths()
    assert extra["cost_flops"] > 0


async def test_every_model_answers_the_easy_questions_it_was_trained_for(
    client: AsyncClient,
) -> None:
    questions = [q for q in catalogue.demo_questions(400) if _is_easy(q)][:20]
    for model, least in (("arith-small", 0.8), ("arith-medium", 0.9), ("arith-large", 0.9)):
        replies = await asyncio.gather(
            *(client.generate(model, q.prompt, temperature=0.0, max_tokens=16) for q in questions)
        )
        right = sum(
            reply.text.strip() == q.answer for reply, q in zip(replies, questions, strict=True)
        )
        assert right >= least * len(questions), model


def _is_easy(question: Question) -> bool:
    return question.level <= 2


async def test_a_seed_repeats_a_sampled_answer_and_n_gives_different_ones(
    client: AsyncClient,
) -> None:
    async def sample(seed: int) -> Sequence[str]:
        reply = await client.generate(
            "arith-small", "9999+", temperature=1.5, seed=seed, n=4, max_tokens=12, ignore_eos=True
        )
        return [choice.text for choice in reply.choices]

    first, again = await sample(7), await sample(7)
    assert first == again
    assert len(set(first)) > 1


async def test_logprobs_are_those_of_the_chosen_tokens(rest_url: str) -> None:
    async with httpx.AsyncClient(base_url=rest_url, timeout=30) as http:
        reply = await http.post(
            "/v1/completions",
            json={"model": "arith-large", "prompt": "12+30=", "temperature": 0, "logprobs": 2},
        )
    body = reply.json()
    logprobs = body["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]).startswith(body["choices"][0]["text"])
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert value == pytest.approx(max(top.values()), abs=1e-5)


async def test_usage_says_how_much_of_a_prompt_was_known(rest_url: str) -> None:
    asked = {"model": "arith-large", "prompt": "1+2=3 " * 6 + "12+30=", "temperature": 0}
    async with httpx.AsyncClient(base_url=rest_url, timeout=30) as http:
        replies = [(await http.post("/v1/completions", json=asked)).json() for _ in range(2)]
    texts = [reply["choices"][0]["text"] for reply in replies]
    assert texts[0] == texts[1]
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
    assert cached == [0, 32]


async def test_a_stop_string_ends_the_text_before_it(client: AsyncClient) -> None:
    reply = await client.generate("arith-large", "123456+654321=", temperature=0.0, stop=["77"])
    assert reply.text == ""
    assert (await client.generate("arith-large", "123456+100000=", temperature=0.0)).text[:3] == (
        "223"
    )


async def test_every_service_serves_health_and_reflection(
    host: ClusterHost, client: AsyncClient
) -> None:
    status = await client.status()
    addresses = {
        "gearfall.v1.Router": host.addresses["grpc"],
        "gearfall.v1.Store": status.nodes[0].address,
        "gearfall.v1.Worker": status.workers[0].address,
        "gearfall.v1.Scheduler": host.service("scheduler").address,
    }
    for name, address in addresses.items():
        async with open_channel(address) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(service=name), timeout=5
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            assert name in await _reflected_services(channel)


async def _reflected_services(channel: grpc.aio.Channel) -> set[str]:
    """List services and fetch the descriptor of each of ours, as grpcurl does."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
    ask = reflection_pb2.ServerReflectionRequest
    call = stub.ServerReflectionInfo(timeout=5)
    await call.write(ask(list_services=""))
    listed = (await call.read()).list_services_response.service
    names = {service.name for service in listed}
    for name in (name for name in names if name.startswith("gearfall.")):
        await call.write(ask(file_containing_symbol=name))
        files = (await call.read()).file_descriptor_response.file_descriptor_proto
        described = [FileDescriptorProto.FromString(data).package for data in files]
        assert "gearfall.v1" in described
    await call.done_writing()
    return names


async def test_metrics_health_and_readiness_are_served(rest_url: str) -> None:
    async with httpx.AsyncClient(base_url=rest_url, timeout=10) as http:
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
        metrics = (await http.get("/metrics")).text
        listed = json.loads((await http.get("/v1/models")).text)
    assert "gearfall_" in metrics
    assert {"arith", "arith-small"} <= {model["id"] for model in listed["data"]}


async def test_cancelling_ends_a_long_answer(client: AsyncClient) -> None:
    stream = client.stream(
        "arith-large", "1+1=", max_tokens=200, ignore_eos=True, logprobs=True, request_id="stop-me"
    )
    seen = 0
    async for event in stream:
        if isinstance(event, TextDelta):
            seen += len(event.logprobs)
            if seen == 3:
                break
    await stream.aclose()  # type: ignore[attr-defined]
    reply = await client.generate("arith-large", "2+2=", temperature=0.0)
    assert reply.text == "4"
    status = await client.status()
    running = {r.model: r.running_jobs for w in status.workers for r in w.replicas}
    assert running["arith-large"] <= 1
