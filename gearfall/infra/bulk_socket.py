"""Ranges of files over plain TCP: what a store hands its neighbours under gRPC's control.

The client sends a one-time token (32 bytes), then any number of requests of 24 bytes: file number,
offset and size, each 8 bytes little-endian. The server answers each with exactly those bytes, by
sendfile, and closes at whatever it does not like. Blocking: each end runs in threads.
"""

import contextlib
import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

from gearfall.core.errors import Unavailable

TOKEN_BYTES = 32
_REQUEST = struct.Struct("<QQQ")
_TIMEOUT_S = 10.0
_MAX_REQUEST_BYTES = 2**30
_BACKLOG = 64


@dataclass(frozen=True, slots=True)
class Offer:
    """What one token opens: descriptors that stay open while it is served, closed by the server."""

    fds: tuple[int, ...]
    sizes: tuple[int, ...]


class BulkServer:
    """Serves each offer to whoever shows its token first."""

    def __init__(self, host: str) -> None:
        """Listen on a free port of `host`."""
        self._listener = socket.create_server((host, 0), backlog=_BACKLOG)
        self._offers: dict[bytes, Offer] = {}
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._is_closed = False
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="bulk-accept", daemon=True).start()

    def offer(self, open_files: Callable[[], Offer]) -> bytes:
        """Return a token good for one connection that may read these files."""
        token = secrets.token_bytes(TOKEN_BYTES)
        offer = open_files()
        with self._lock:
            self._offers[token] = offer
        return token

    def withdraw(self, token: bytes) -> None:
        """Make a token that nobody used worthless. Idempotent."""
        with self._lock:
            offer = self._offers.pop(token, None)
        if offer is not None:
            _close(offer)

    def close(self) -> None:
        """Stop listening and cut every connection."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections, tokens = tuple(self._connections), tuple(self._offers)
        for token in tokens:
            self.withdraw(token)
        for connection in connections:
            _cut(connection)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection,), name="bulk", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError, EOFError):
                connection.settimeout(_TIMEOUT_S)
                token = bytes(_receive(connection, TOKEN_BYTES))
                with self._lock:
                    offer = self._offers.pop(token, None)
                if offer is not None:
                    try:
                        _answer(connection, offer)
                    finally:
                        _close(offer)
        finally:
            with self._lock:
                self._connections.discard(connection)


class BulkConnection:
    """One connection to a neighbour's bulk server. Used by one thread at a time."""

    def __init__(
        self, host: str, port: int, token: bytes, *, timeout_s: float = _TIMEOUT_S
    ) -> None:
        """Raises Unavailable when nobody listens."""
        self._peer = f"{host}:{port}"
        try:
            self._socket = socket.create_connection((host, port), timeout=timeout_s)
            self._socket.sendall(token)
        except OSError as error:
            raise Unavailable(f"{self._peer} can't be reached: {error}") from error

    def read_into(self, file: int, offset_bytes: int, destination: memoryview) -> None:
        """Fill `destination` from a file's offset. Raises Unavailable when the peer is cut off."""
        try:
            self._socket.sendall(_REQUEST.pack(file, offset_bytes, len(destination)))
            _receive_into(self._socket, destination)
        except (OSError, EOFError) as error:
            raise Unavailable(f"{self._peer} was cut off: {error or type(error)}") from error

    def cut(self) -> None:
        """Make a read under way in another thread fail now."""
        _cut(self._socket)

    def close(self) -> None:
        """Close it. Idempotent."""
        self._socket.close()


def _answer(connection: socket.socket, offer: Offer) -> None:
    while True:
        file, offset, size = _REQUEST.unpack(_receive(connection, _REQUEST.size))
        if file >= len(offer.fds) or size > _MAX_REQUEST_BYTES or offset + size > offer.sizes[file]:
            return
        _send_file(connection, offer.fds[file], offset, size)


def _send_file(connection: socket.socket, fd: int, offset: int, size: int) -> None:
    end = offset + size
    while offset < end:
        try:
            sent = os.sendfile(connection.fileno(), fd, offset, end - offset)
        except BlockingIOError:
            _wait_writable(connection)
            continue
        if sent == 0:
            raise EOFError("the file is shorter than it was")
        offset += sent


def _wait_writable(connection: socket.socket) -> None:
    """A socket with a timeout does not block by itself."""
    poller = select.poll()
    poller.register(connection, select.POLLOUT)
    if not poller.poll(_TIMEOUT_S * 1000):
        raise TimeoutError("the neighbour takes no more")


def _receive(connection: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    _receive_into(connection, memoryview(content))
    return content


def _receive_into(connection: socket.socket, destination: memoryview) -> None:
    done = 0
    while done < len(destination):
        count = connection.recv_into(destination[done:])
        if count == 0:
            raise EOFError("the peer closed the connection")
        done += count


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _close(offer: Offer) -> None:
    for fd in offer.fds:
        os.close(fd)
