"""The HTTP server's socket."""

import socket

import pytest
from starlette.applications import Starlette

from gearfall.core.errors import Unavailable
from gearfall.infra.http_server import bind, start_http_server


def test_connections_send_at_once():
    with bind("127.0.0.1:0") as listener:
        assert listener.proto == socket.IPPROTO_TCP
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "127.0.0.1:x", "nonsense", "192.0.2.1:0"])
async def test_what_cannot_be_bound_is_unavailable(listen):
    with pytest.raises(Unavailable, match="listen"):
        await start_http_server(Starlette(), listen)
