"""Who shows a token first is served, and whoever waits in vain is told."""

import socket
import threading
from collections.abc import Iterator

import pytest

from gearfall.infra.net.token_listener import TOKEN_BYTES, TokenListener, receive

HOST = "127.0.0.1"


class Echo:
    """Gives back five bytes."""

    def __init__(self) -> None:
        self.served = threading.Event()
        self.dismissals = 0

    def serve(self, connection: socket.socket) -> None:
        self.served.set()
        connection.sendall(receive(connection, 5))

    def dismiss(self) -> None:
        self.dismissals += 1


@pytest.fixture
def listener() -> Iterator[TokenListener]:
    opened = TokenListener(HOST, name="test")
    yield opened
    opened.close()


def talk(listener: TokenListener, token: bytes) -> bytes:
    """Show a token, say something and return what is answered until the end."""
    with socket.create_connection((HOST, listener.port), timeout=10) as connection:
        connection.sendall(token + b"hello")
        answer = b""
        try:
            while part := connection.recv(64):
                answer += part
        except ConnectionResetError:  # it closed before it had read all
            pass
        return answer


def test_the_first_to_show_a_token_is_served_and_nobody_after(listener: TokenListener) -> None:
    guest = Echo()
    token = listener.expect(guest)
    assert talk(listener, token) == b"hello"
    assert talk(listener, token) == b""
    assert talk(listener, bytes(TOKEN_BYTES)) == b""
    listener.forget(token)
    assert guest.dismissals == 0


def test_a_forgotten_guest_is_told_once(listener: TokenListener) -> None:
    guest = Echo()
    token = listener.expect(guest)
    listener.forget(token)
    listener.forget(token)
    assert guest.dismissals == 1
    assert talk(listener, token) == b""
    assert not guest.served.is_set()


def test_a_token_that_was_taken_elsewhere_opens_nothing_here(listener: TokenListener) -> None:
    guest = Echo()
    token = listener.expect(guest)
    assert listener.take(token) is guest
    assert listener.take(token) is None
    assert talk(listener, token) == b""


def test_the_end_cuts_connections_and_dismisses_who_still_waits(listener: TokenListener) -> None:
    here, waiting = Echo(), Echo()
    token = listener.expect(here)
    listener.expect(waiting)
    with socket.create_connection((HOST, listener.port), timeout=10) as connection:
        connection.sendall(token)
        assert here.served.wait(10)
        listener.close()
        assert connection.recv(1) == b""
    assert (here.dismissals, waiting.dismissals) == (0, 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, listener.port), timeout=10)
