"""Serves an ASGI application by uvicorn inside a running loop; the caller owns the signals."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from gearfall.core.errors import Internal, Unavailable

_BACKLOG = 2048
_IDLE_S = 75
"""How long a kept connection may be idle. Clients and proxies that keep theirs for 5 to 60 s would
send a request into one that is just being closed otherwise."""
_STALLED_MS = 120_000
"""After which a client that takes in nothing of what was sent counts as gone."""
_TICK_S = 1.0
"""How often answers get another date. uvicorn's own loop wakes ten times as often, to look whether
it is to end: in six idle processes that was a fifth of what they burned."""


class _Server(uvicorn.Server):
    """Tells when it serves; leaves signals alone, which the service's main handles."""

    def __init__(self, config: uvicorn.Config, *, tick_s: float = _TICK_S) -> None:
        super().__init__(config)
        self.serves = asyncio.Event()
        self._tick_s = tick_s
        self._ends = asyncio.Event()

    async def main_loop(self) -> None:
        """Keep the date of answers until it is to end."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s):
                    await self._ends.wait()

    def end(self) -> None:
        """Have `serve` return. Idempotent."""
        self.should_exit = True
        self._ends.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup(sockets)
        self.serves.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class HttpServer:
    """A started HTTP server; `address` is where it listens."""

    def __init__(self, server: _Server, task: "asyncio.Task[None]", address: str) -> None:
        self._server = server
        self._task = task
        self.address = address

    async def stop(self) -> None:
        """Let running responses end within the server's grace, then close."""
        self._server.end()
        await self._task


async def start_http_server(app: Starlette, listen: str) -> HttpServer:
    """Serve `app` on host:port (port 0 picks a free one). Unavailable if it can't be bound."""
    host = listen.rpartition(":")[0]
    try:
        listener = bind(listen)
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
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=3,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http-server")
    serves = asyncio.create_task(server.serves.wait(), name="http-serves")
    await asyncio.wait((task, serves), return_when=asyncio.FIRST_COMPLETED)
    if not server.serves.is_set():
        serves.cancel()
        task.result()
        raise Internal("the HTTP server ended before it started")
    return HttpServer(server, task, f"{host}:{listener.getsockname()[1]}")


def bind(listen: str) -> socket.socket:
    """Return a listening socket; its connections send at once, and end when their client stalls.

    asyncio turns Nagle's algorithm off only on sockets whose protocol is named: without that every
    answer on a kept connection waits 40 ms for the client's delayed acknowledgement.
    """
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)
        listener.bind((host.strip("[]"), int(port)))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
