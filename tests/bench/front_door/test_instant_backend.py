"""The backend that answers at once speaks what OpenAI's clients read."""

import json
from typing import Any

import httpx
import pytest

from bench.front_door.instant_backend import TOKEN, build_app
from bench.front_door.k6 import TOKEN as EXPECTED_TOKEN


@pytest.fixture
def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(build_app()), base_url="http://backend")


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    reply = await client.post("/v1/chat/completions", json=body | fields)
    assert reply.status_code == httpx.codes.OK
    return reply


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    *events, end = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert end == "[DONE]"
    return [json.loads(event) for event in events]


async def test_a_whole_answer_has_as_many_tokens_as_asked(client: httpx.AsyncClient) -> None:
    answer = (await ask(client)).json()
    assert answer["choices"][0]["message"]["content"] == TOKEN * 5
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


async def test_a_stream_has_one_chunk_for_each_token(client: httpx.AsyncClient) -> None:
    events = events_of(await ask(client, stream=True))
    deltas = [event["choices"][0]["delta"].get("content") for event in events]
    assert deltas == ["", *[TOKEN] * 5, None]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_stream_reports_usage_when_asked(client: httpx.AsyncClient) -> None:
    events = events_of(await ask(client, stream=True, stream_options={"include_usage": True}))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5


def test_it_says_what_the_load_expects() -> None:
    assert TOKEN == EXPECTED_TOKEN
