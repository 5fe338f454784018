"""An OpenAI-compatible chat server that answers at once: the floor, and the model behind the peer.

Run as `python -m bench.front_door.instant_backend`; it serves a free loopback port and announces it
as the services do.
The answer is TOKEN repeated `max_tokens` times, as a stream one chunk for each token.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping

import orjson
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from gearfall.infra.service_main import announce_ready

TOKEN = "4"
PROMPT_TOKENS = 7


async def answer(request: Request) -> Response:
    """Answer /v1/chat/completions with as many tokens as were asked for."""
    body = orjson.loads(await request.body())
    tokens = int(body.get("max_tokens") or 1)
    if body.get("stream"):
        with_usage = (body.get("stream_options") or {}).get("include_usage", False)
        return StreamingResponse(
            stream_chunks(tokens, with_usage=with_usage), media_type="text/event-stream"
        )
    message = {"role": "assistant", "content": TOKEN * tokens}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
    whole = _head("chat.completion") | {"choices": [choice], "usage": _usage(tokens)}
    return Response(orjson.dumps(whole), media_type="application/json")


async def stream_chunks(tokens: int, *, with_usage: bool) -> AsyncIterator[bytes]:
    """Yield the events of a streamed answer."""
    head = _head("chat.completion.chunk")
    yield _event(head | {"choices": [_delta({"role": "assistant", "content": ""}, None)]})
    for _ in range(tokens):
        yield _event(head | {"choices": [_delta({"content": TOKEN}, None)]})
        await asyncio.sleep(0)  # let other requests in between, as a model's steps do
    yield _event(head | {"choices": [_delta({}, "length")]})
    if with_usage:
        yield _event(head | {"choices": [], "usage": _usage(tokens)})
    yield b"data: [DONE]\n\n"


def _head(kind: str) -> dict[str, object]:
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": "instant"}


def _delta(delta: Mapping[str, str], finish: str | None) -> dict[str, object]:
    return {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}


def _usage(tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
    }


def _event(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def build_app() -> Starlette:
    """Return the application."""
    return Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])


def main() -> None:
    """Serve until killed."""
    listener = socket.create_server(("127.0.0.1", 0))
    announce_ready("backend", f"127.0.0.1:{listener.getsockname()[1]}")
    config = uvicorn.Config(build_app(), log_level="warning", access_log=False)
    # uvloop sets TCP_NODELAY on every connection; asyncio's own loop does so only for listeners
    # with an explicit protocol, and the answers would then wait 40 ms for a delayed ACK.
    uvloop.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
