"""Serves an ASGI application by uvicorn inside a running loop; the caller owns the signals."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from gearfall.core.errors import Internal, Unavailable

_BACKLOG = 2048


class _Server(uvicorn.Server):
    """Leaves signals alone: the service's main handles them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class RestServer:
    """A started HTTP server; `address` is where it listens."""

    def __init__(self, server: uvicorn.Server, task: "asyncio.Task[None]", address: str) -> None:
        self._server = server
        self._task = task
        self.address = address

    async def stop(self) -> None:
        """Let running responses end within the server's grace, then close."""
        self._server.should_exit = True
        await self._task


async def start_rest_server(app: Starlette, listen: str) -> RestServer:
    """Serve `app` on host:port (port 0 picks a free one). Unavailable if it can't be bound."""
    host, _, port = listen.rpartition(":")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server(
            (host.strip("[]"), int(port)), family=family, backlog=_BACKLOG
        )
    except (OSError, ValueError, OverflowError) as error:
        raise Unavailable(f"cannot listen on {listen}: {error}") from error
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=3,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="rest-server")
    while not server.started:
        if task.done():
            task.result()
            raise Internal("the REST server ended before it started")
        await asyncio.sleep(0.005)
    return RestServer(server, task, f"{host}:{listener.getsockname()[1]}")
