"""An engine's ear at its store: how far the bytes are that it computes with, and how it ended."""

import select
import socket
from collections.abc import Mapping

import msgspec

from gearfall.core.errors import Internal, Unavailable
from gearfall.infra.memory.attach_protocol import FillNews
from services.worker.engine_link.frames import FrameDecoder

_READ_BYTES = 1 << 16
_DECODER = msgspec.json.Decoder(FillNews)


class LoadNews:
    """Follows one load on the connection of its lease; implements `units.Arrival`."""

    def __init__(self, connection: socket.socket) -> None:
        """Own `connection`, on which nobody else may read."""
        connection.setblocking(False)
        self._connection = connection
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)
        self._frames = FrameDecoder()
        self._last = FillNews()

    def wait(self, ends_bytes: Mapping[int, int]) -> None:
        """Return when each of these partitions is verified up to the byte that is named.

        Raises what the load failed with, Unavailable when the store is gone.
        """
        while not self._covers(ends_bytes):
            self._hear()

    def wait_done(self) -> None:
        """Return when the store has said that the whole load is verified; raises as `wait`."""
        while not self._last.is_done:
            self._hear()
        self.close()

    def close(self) -> None:
        """Let go of the connection. Idempotent."""
        self._connection.close()

    def _covers(self, ends_bytes: Mapping[int, int]) -> bool:
        verified = self._last.verified_bytes
        return all(
            partition < len(verified) and verified[partition] >= end
            for partition, end in ends_bytes.items()
        )

    def _hear(self) -> None:
        """Wait for news and take the latest of them."""
        self._poller.poll()
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            raise Unavailable("the store went away while it loaded the model")
        for body in self._frames.feed(data):
            try:
                self._last = _DECODER.decode(body)
            except msgspec.DecodeError as error:
                raise Internal(f"the store sent malformed news of a load: {error}") from None
            self._last.check()
