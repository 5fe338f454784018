"""What the REST door refuses: each with OpenAI's status, body and the field that is wrong."""

import json
from collections.abc import AsyncIterator

import openai
import pytest

from tests.services.router.doors.test_rest import CHAT, PLAIN, chat
from tests.services.router.rig import Answer

BAD_FIELDS = [
    (CHAT, chat(model="nobody"), 404, "model"),
    (CHAT, {"model": "small"}, 400, "messages"),
    (CHAT, chat(messages=[]), 400, "messages"),
    (CHAT, chat(messages="hi"), 400, "messages"),
    (CHAT, chat(messages=[{"content": "hi"}]), 400, "messages[0].role"),
    (CHAT, chat(messages=[{"role": "", "content": "hi"}]), 400, "messages[0].role"),
    (CHAT, chat(messages=[{"role": "u" * 65, "content": "hi"}]), 400, "messages[0].role"),
    (CHAT, chat(messages=[{"role": "user", "content": 3}]), 400, "messages[0].content"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        400,
        "messages[0].content[0]",
    ),
    (CHAT, chat(n=10**9), 400, "n"),
    (CHAT, chat(n=0), 400, "n"),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens"),
    (CHAT, chat(max_completion_tokens=0), 400, "max_completion_tokens"),
    (CHAT, chat(max_tokens="many"), 400, "max_tokens"),
    (CHAT, chat(max_tokens=10**40, n=17), 400, "n"),
    (CHAT, chat(temperature=2.1), 400, "temperature"),
    (CHAT, chat(temperature="hot"), 400, "temperature"),
    (CHAT, chat(top_p=0), 400, "top_p"),
    (CHAT, chat(top_k=-2), 400, "top_k"),
    (CHAT, chat(seed=2**64), 400, "seed"),
    (CHAT, chat(stop=[""]), 400, "stop"),
    (CHAT, chat(stop=["x"] * 17), 400, "stop"),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format"),
    (CHAT, chat(presence_penalty=1), 400, "presence_penalty"),
    (CHAT, chat(repetition_penalty=1.1), 400, "repetition_penalty"),
    (CHAT, chat(min_p=0.1), 400, "min_p"),
    (CHAT, chat(min_tokens=2), 400, "min_tokens"),
    (CHAT, chat(stop_token_ids=[1]), 400, "stop_token_ids"),
    (CHAT, chat(guided_json={}), 400, "guided_json"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice"),
    (CHAT, chat(tool_choice={"type": "function"}), 400, "tool_choice"),
    (CHAT, chat(function_call={"name": "f"}), 400, "function_call"),
    (CHAT, chat(modalities=["text", "audio"]), 400, "modalities"),
    (CHAT, chat(web_search_options={}), 400, "web_search_options"),
    (
        CHAT,
        chat(messages=[{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]),
        400,
        "messages[0].tool_calls",
    ),
    (CHAT, chat(tenant="t" * 129), 400, "tenant"),
    (PLAIN, {"model": "small", "prompt": "hi", "suffix": "x"}, 400, "suffix"),
    (CHAT, chat(stream="yes"), 400, "stream"),
    (CHAT, chat(timeout_s=-1), 400, "timeout_s"),
    (CHAT, chat(messages=[{"role": "user", "content": "x" * 300}]), 400, "messages"),
    (PLAIN, {"model": "small", "prompt": "x" * 300}, 400, "prompt"),
    (PLAIN, {"model": "small", "prompt": []}, 400, "prompt"),
    (PLAIN, {"model": "small", "prompt": [1, "x"]}, 400, "prompt"),
    (PLAIN, {"model": "small", "prompt": [-1]}, 400, "prompt[0]"),
    (PLAIN, {"model": "small", "prompt": [10**6]}, 400, "prompt"),
    (PLAIN, {"model": "small", "prompt": {"a": 1}}, 400, "prompt"),
    (PLAIN, {"model": "small", "prompt": "hi", "echo": True}, 400, "echo"),
    (PLAIN, {"model": "small", "prompt": "hi", "logprobs": 99}, 400, "logprobs"),
]
"""Path, body, status and the parameter that the error names."""


async def test_bad_fields_are_named_and_the_router_lives(rig, http):
    rig.worker(small=Answer("fine"))
    for path, body, status, param in BAD_FIELDS:
        reply = await http.post(path, json=body)
        assert reply.status_code == status, (body, reply.text)
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param, (body, error)
        alive = (await http.post(CHAT, json=chat())).json()
        assert alive["choices"][0]["message"]["content"] == "fine"


async def test_fields_that_ask_for_nothing_are_taken(rig, http):
    worker = rig.worker(small=Answer("fine"))
    harmless = {
        "tools": [],
        "functions": [],
        "tool_choice": "auto",
        "function_call": "none",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "logit_bias": {},
        "user": "me",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_p": 0,
        "min_tokens": 0,
        "stop_token_ids": [],
        "guided_json": None,
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "tenant": "acme",
    }
    reply = await http.post(CHAT, json=chat(**harmless))
    assert reply.status_code == 200, reply.text
    body = {"model": "small", "prompt": "hi", "echo": False, "suffix": "", "best_of": 1}
    assert (await http.post(PLAIN, json=body)).status_code == 200
    assert [job.tenant for job in worker.jobs] == ["acme", ""]


async def test_a_refused_part_is_not_repeated_whole(rig, http):
    for part in ({"type": "x" * 10**6, "text": "hi"}, {"type": "text"}):
        reply = await http.post(CHAT, json=chat(messages=[{"role": "user", "content": [part]}]))
        assert reply.status_code == 400
        assert len(reply.content) < 1000


async def test_malformed_json(rig, http):
    bodies = (
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "\\ud800"}',
    )
    for content in bodies:
        reply = await http.post(CHAT, content=content)
        assert reply.status_code == 400, content[:20]
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_a_large_body_is_refused_whole_or_in_chunks(rig, http):
    large = json.dumps(chat(messages=[{"role": "user", "content": "x" * 10_000_000}])).encode()

    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(large), 1 << 20):
            yield large[at : at + (1 << 20)]

    for content in (large, parts()):
        reply = await http.post(CHAT, content=content)
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "request_too_large"


async def test_unknown_routes_and_methods(rig, http):
    for reply, status in ((await http.get("/v1/x"), 404), (await http.get(CHAT), 405)):
        assert reply.status_code == status
        assert reply.json()["error"]["message"]
    embeddings = await http.post("/v1/embeddings", json={"model": "small", "input": "hi"})
    assert embeddings.status_code == 404
    assert CHAT in embeddings.json()["error"]["message"]


async def test_the_context_error_has_openais_code(rig, client):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="small", prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded"
