"""One port at which a connection that shows a one-time token (32 bytes) is served, and no other.

Blocking: each connection has a thread. The token is given out over gRPC, which controls what the
connection is for; whoever shows it first has it.
"""

import contextlib
import secrets
import socket
import threading
from typing import Protocol

TOKEN_BYTES = 32
TIMEOUT_S = 10.0
"""Longest that a connection may take to show its token."""
_BACKLOG = 64


class Guest(Protocol):
    """Who waits for one connection."""

    def serve(self, connection: socket.socket) -> None:
        """Talk to whoever showed the token; OSError and EOFError end it.

        On a thread of its own. The connection, whose timeout is `TIMEOUT_S`, is closed afterwards.
        """
        ...

    def dismiss(self) -> None:
        """Nobody will come: the token was forgotten before it was shown."""
        ...


class TokenListener:
    """Owner of a port, the tokens that are still good, and the connections."""

    def __init__(self, host: str, *, name: str) -> None:
        """Listen on a free port of `host`; `name` is that of the threads."""
        self._name = name
        self._listener = socket.create_server((host, 0), backlog=_BACKLOG)
        self._guests: dict[bytes, Guest] = {}
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True).start()

    def expect(self, guest: Guest) -> bytes:
        """Return a token good for one connection."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._guests[token] = guest
        return token

    def take(self, token: bytes) -> Guest | None:
        """Return who waits for this token, which is worthless from now on; None if nobody does."""
        with self._lock:
            return self._guests.pop(token, None)

    def forget(self, token: bytes) -> None:
        """Make a token that nobody showed worthless. Idempotent."""
        if (guest := self.take(token)) is not None:
            guest.dismiss()

    def close(self) -> None:
        """Stop listening, forget every token and cut every connection. Idempotent."""
        cut(self._listener)
        self._listener.close()
        with self._lock:
            connections, tokens = tuple(self._connections), tuple(self._guests)
        for token in tokens:
            self.forget(token)
        for connection in connections:
            cut(connection)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection,), name=self._name, daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError, EOFError):
                connection.settimeout(TIMEOUT_S)
                guest = self.take(bytes(receive(connection, TOKEN_BYTES)))
                if guest is not None:
                    guest.serve(connection)
        finally:
            with self._lock:
                self._connections.discard(connection)


def receive(connection: socket.socket, size: int) -> bytearray:
    """Return exactly `size` bytes. Raises EOFError when the peer closes before."""
    content = bytearray(size)
    receive_into(connection, memoryview(content))
    return content


def receive_into(connection: socket.socket, destination: memoryview) -> None:
    """Fill `destination`. Raises EOFError when the peer closes before."""
    done = 0
    while done < len(destination):
        count = connection.recv_into(destination[done:])
        if count == 0:
            raise EOFError("the peer closed the connection")
        done += count


def cut(connection: socket.socket) -> None:
    """Make whatever another thread does with it fail now."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
