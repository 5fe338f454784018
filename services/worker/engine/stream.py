"""The engine's end of its socket: commands in, results out, no write that waits."""

import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from services.worker.engine.batching.gathering import Gathering
from services.worker.engine_link.frames import FrameDecoder, encode_frame, receive_some, send_header
from services.worker.engine_link.messages import EngineMessage, StepDone, WorkerMessage

MAX_BACKLOG_BYTES = 16 << 20
"""Unsent results beyond which the engine computes nothing until the worker reads."""

_READ_BYTES = 1 << 18
_DECODER = msgspec.msgpack.Decoder(WorkerMessage)


class EngineStream:
    """Buffers both ways over a Unix socket that never blocks; tells steps as jobs gather them."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        max_backlog_bytes: int = MAX_BACKLOG_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_backlog_bytes`: unsent results beyond which it is choked; `clock`: seconds."""
        sock.setblocking(False)
        self._clock = clock
        self._gathering = Gathering()
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
        """Buffer a message and send what goes without waiting; a step may be held back first.

        Copies of `descriptors` travel beside it, which only the very first message can have.
        """
        if isinstance(message, StepDone):
            due = self._gathering.add(message, self._clock())
            if due is not None:
                self._send(due)
        else:
            self._send(message, descriptors)

    def _send(self, message: EngineMessage, descriptors: Sequence[int] = ()) -> None:
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
            self._tell_held()
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
            for body in self._decoder.feed(data):
                messages.append(message := _DECODER.decode(body))
                self._gathering.note(message)
        return messages

    def take_descriptors(self) -> list[int]:
        """Return the descriptors of the first message with some for which this was not called."""
        return self._descriptors.popleft() if self._descriptors else []

    def drain(self) -> None:
        """Send everything that is left, waiting for the worker as long as it is there."""
        self._tell_held()
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

    def _tell_held(self) -> None:
        held = self._gathering.take(self._clock())
        if held is not None:
            self._send(held)

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
