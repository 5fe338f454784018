"""The engine's end of its socket: commands in, results out, no write that waits."""

import select
import socket
from collections import deque
from collections.abc import Sequence

import msgspec

from services.worker.engine_link.frames import FrameDecoder, encode_frame, receive_some, send_header
from services.worker.engine_link.messages import EngineMessage, WorkerMessage

MAX_BACKLOG_BYTES = 16 << 20
"""Unsent results beyond which the engine computes nothing until the worker reads."""

_READ_BYTES = 1 << 18
_DECODER = msgspec.msgpack.Decoder(WorkerMessage)


class EngineStream:
    """Buffers both ways over a Unix socket that never blocks."""

    def __init__(self, sock: socket.socket, *, max_backlog_bytes: int = MAX_BACKLOG_BYTES) -> None:
        """`max_backlog_bytes`: unsent results beyond which it is choked."""
        sock.setblocking(False)
        self._max_backlog_bytes = max_backlog_bytes
        self._sock = sock
        self._decoder = FrameDecoder()
        self._unsent = bytearray()
        self._descriptors: deque[list[int]] = deque()
        self.is_closed = False
        """Whether the worker closed its end or died."""

    @property
    def is_choked(self) -> bool:
        """Whether the worker reads too slowly for more results."""
        return len(self._unsent) > self._max_backlog_bytes

    def send(self, message: EngineMessage, descriptors: Sequence[int] = ()) -> None:
        """Buffer a message and send what goes without waiting.

        Copies of `descriptors` travel beside it, which only the very first message can have.
        """
        body = msgspec.msgpack.encode(message)
        if descriptors:
            assert not self._unsent
            self._send_header(body, descriptors)
            self._unsent += body
        else:
            self._unsent += encode_frame(body)
        self._flush()

    def receive(self, *, wait: bool) -> list[WorkerMessage]:
        """Return what has come; with `wait`, return only when something came or could be sent.

        Empty and `is_closed` at the end of the stream. Raises Internal for a malformed frame.
        """
        if wait and not self.is_closed:
            self._wait()
        self._flush()
        messages: list[WorkerMessage] = []
        while not self.is_closed:
            try:
                data, descriptors = receive_some(self._sock, _READ_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                data, descriptors = b"", []
            if descriptors:
                self._descriptors.append(descriptors)
            if not data:
                self.is_closed = True
            messages += [_DECODER.decode(body) for body in self._decoder.feed(data)]
        return messages

    def take_descriptors(self) -> list[int]:
        """Return the descriptors of the first message with some for which this was not called."""
        return self._descriptors.popleft() if self._descriptors else []

    def drain(self) -> None:
        """Send everything that is left, waiting for the worker as long as it is there."""
        while self._unsent and not self.is_closed:
            poller = select.poll()
            poller.register(self._sock, select.POLLOUT)
            poller.poll()
            self._flush()

    def _send_header(self, body: bytes, descriptors: Sequence[int]) -> None:
        try:
            send_header(self._sock, body, descriptors)
        except OSError:
            self.is_closed = True

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        poller.poll()

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._sock.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()
            self.is_closed = True
