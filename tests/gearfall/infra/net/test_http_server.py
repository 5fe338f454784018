"""The HTTP server's socket."""

import asyncio
import socket

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from gearfall.core.errors import Unavailable
from gearfall.infra.net.http_server import _Server, bind, start_http_server


def test_connections_send_at_once():
    with bind("127.0.0.1:0") as listener:
        assert listener.proto == socket.IPPROTO_TCP
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has it")
def test_a_client_that_stalls_loses_its_connection():
    with bind("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            stalled_ms = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert 10_000 <= stalled_ms <= 600_000


async def test_a_kept_connection_outlives_those_that_proxies_keep(monkeypatch):
    """A load balancer keeps an idle connection for a minute."""

    async def greet(request):
        return PlainTextResponse("hi")

    delays = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def noted(delay, callback, *arguments):
        if getattr(callback, "__name__", "") == "timeout_keep_alive_handler":
            delays.append(delay)
        return call_later(delay, callback, *arguments)

    monkeypatch.setattr(loop, "call_later", noted)
    server = await start_http_server(Starlette(routes=[Route("/", greet)]), "127.0.0.1:0")
    async with httpx.AsyncClient(base_url=f"http://{server.address}") as client:
        assert (await client.get("/")).text == "hi"
    await server.stop()
    assert [delay > 60 for delay in delays] == [True]


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "127.0.0.1:x", "nonsense", "192.0.2.1:0"])
async def test_what_cannot_be_bound_is_unavailable(listen):
    with pytest.raises(Unavailable, match="listen"):
        await start_http_server(Starlette(), listen)


class Ticking(_Server):
    ticks = 0

    def __init__(self, **settings):
        super().__init__(uvicorn.Config(Starlette(), log_config=None), **settings)
        self.has_ticked_again = asyncio.Event()

    async def on_tick(self, counter):
        self.ticks += 1
        if self.ticks == 3:
            self.has_ticked_again.set()
        return await super().on_tick(counter)


async def test_the_server_sleeps_between_ticks_and_ends_at_once():
    server = Ticking(tick_s=3600.0)
    loop = asyncio.create_task(server.main_loop())
    await asyncio.sleep(0)
    assert server.ticks == 1
    ((name, _date),) = server.server_state.default_headers[:1]
    assert name == b"date"
    server.end()
    await asyncio.wait_for(loop, 10)
    assert server.ticks == 2


async def test_a_tick_gives_answers_another_date():
    server = Ticking(tick_s=0.001)
    loop = asyncio.create_task(server.main_loop())
    await asyncio.wait_for(server.has_ticked_again.wait(), 10)
    server.end()
    await asyncio.wait_for(loop, 10)
