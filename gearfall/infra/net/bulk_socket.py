"""Ranges of files over plain TCP: what a store hands its neighbours under gRPC's control.

The client sends a one-time token (32 bytes), then any number of requests of 24 bytes: file number,
offset and size, each 8 bytes little-endian. The server answers each with exactly those bytes, by
sendfile, and closes at whatever it does not like. Blocking: each end runs in threads.
"""

import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from gearfall.core.errors import Unavailable
from gearfall.infra.net.token_listener import TIMEOUT_S, TokenListener, cut, receive, receive_into

_REQUEST = struct.Struct("<QQQ")
_MAX_REQUEST_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Offer:
    """What one token opens: descriptors that stay open while it is served, closed by the server."""

    fds: tuple[int, ...]
    sizes: tuple[int, ...]

    def serve(self, connection: socket.socket) -> None:
        """See `Guest`."""
        try:
            while True:
                file, offset, size = _REQUEST.unpack(receive(connection, _REQUEST.size))
                if not self._has(file, offset, size):
                    return
                _send_file(connection, self.fds[file], offset, size)
        finally:
            self.dismiss()

    def dismiss(self) -> None:
        """See `Guest`."""
        for fd in self.fds:
            os.close(fd)

    def _has(self, file: int, offset: int, size: int) -> bool:
        is_served = file < len(self.fds) and size <= _MAX_REQUEST_BYTES
        return is_served and offset + size <= self.sizes[file]


class BulkServer:
    """Serves each offer to whoever shows its token first."""

    def __init__(self, host: str) -> None:
        """Listen on a free port of `host`."""
        self._listener = TokenListener(host, name="bulk")
        self.port = self._listener.port

    def offer(self, open_files: Callable[[], Offer]) -> bytes:
        """Return a token good for one connection that may read these files."""
        return self._listener.expect(open_files())

    def withdraw(self, token: bytes) -> None:
        """Make a token that nobody used worthless. Idempotent."""
        self._listener.forget(token)

    def close(self) -> None:
        """Stop listening and cut every connection."""
        self._listener.close()


class BulkConnection:
    """One connection to a neighbour's bulk server. Used by one thread at a time."""

    def __init__(self, host: str, port: int, token: bytes, *, timeout_s: float = TIMEOUT_S) -> None:
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
            receive_into(self._socket, destination)
        except (OSError, EOFError) as error:
            raise Unavailable(f"{self._peer} was cut off: {error or type(error)}") from error

    def cut(self) -> None:
        """Make a read under way in another thread fail now."""
        cut(self._socket)

    def close(self) -> None:
        """Close it. Idempotent."""
        self._socket.close()


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
    if not poller.poll(TIMEOUT_S * 1000):
        raise TimeoutError("the neighbour takes no more")
