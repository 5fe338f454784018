"""Stream modes through the REST door of a whole cluster, with the official client."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI

from gearfall.client import AsyncClient
from gearfall.core.generation.streaming import Streaming, StreamMode
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage

pytestmark = pytest.mark.usefixtures("demo_family")

HARD = "123456+654321"
"""The small model is not certain of it from its first digits on."""
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": HARD}], "temperature": 0}


@pytest.fixture
async def openai(rest_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{rest_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def deployment(client: AsyncClient) -> AsyncIterator[str]:
    """A cascade whose small model is as good as never certain enough, and finishes its drafts."""
    name = DeploymentName("arith-verified")
    stages = (Stage(ModelName("arith-small"), 0.999), Stage(ModelName("arith-large")))
    streaming = Streaming(StreamMode.DRAFT, finishes_drafts=True)
    await client.deploy(DeploymentRecord(name, stages, streaming=streaming))
    yield name
    await client.remove_deployment(name)


async def follow(openai: AsyncOpenAI, model: str, **fields: Any) -> dict[str, Any]:
    """What a client has in the end that does as `gearfall.replace` says."""
    stream = await openai.chat.completions.create(
        model=model, stream=True, extra_body=fields, **ASK
    )
    text, replaced, said = "", [], {}
    async for chunk in stream:
        said = (chunk.model_extra or {}).get("gearfall", {})
        if "replace" in said:
            assert said["replace"]["characters"] == len(text)
            replaced.append(text)
            text = ""
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return {"text": text, "replaced": replaced, "stages": said["stages"], "model": said["model"]}


async def whole(openai: AsyncOpenAI, model: str, **fields: Any) -> str:
    answer = await openai.chat.completions.create(model=model, extra_body=fields, **ASK)
    text: str = answer.choices[0].message.content or ""
    assert text
    return text


async def test_a_draft_is_seen_and_replaced(openai: AsyncOpenAI, deployment: str) -> None:
    seen = await follow(openai, deployment)
    assert seen["model"] == "arith-large"
    (draft,) = seen["replaced"]
    assert draft == await whole(openai, "arith-small")
    assert seen["text"] == await whole(openai, deployment) == await whole(openai, "arith-large")


async def test_an_uncertain_beginning_is_never_seen(openai: AsyncOpenAI, deployment: str) -> None:
    fields = {"stream_mode": "early", "hold_tokens": 2}
    seen = await follow(openai, deployment, **fields)
    assert (seen["replaced"], seen["model"]) == ([], "arith-large")
    small = seen["stages"][0]
    assert small["stopped_early"]
    assert small["spared_tokens"] > 0
    assert seen["text"] == await whole(openai, deployment, **fields)


async def test_a_hopeless_draft_is_stopped(openai: AsyncOpenAI, client: AsyncClient) -> None:
    """With the demo's own cascade: what is stopped would have gone up as well."""
    stopped = await follow(openai, "arith", stream_mode="buffer")
    stages = stopped["stages"]
    for report in stages[:-1]:
        assert report["certainty"] < report["threshold"]
        alone = await client.generate(
            report["model"], ASK["messages"], temperature=0.0, max_tokens=1024
        )
        if report["stopped_early"]:
            assert report["completion_tokens"] <= alone.choices[0].usage.completion_tokens
    assert any(report["stopped_early"] for report in stages[:-1])
    assert stopped["text"] == await whole(openai, stopped["model"])
