"""What a store and the holders of its memory say to each other (docs/protocol.md).

A frame is a 4-byte little-endian length and a JSON message. Nothing here imports grpc: an engine
reads the news of a load.
"""

import asyncio
import socket
import struct
from typing import Any

import msgspec

from gearfall.core.errors import (
    Conflict,
    CorruptCheckpoint,
    GearfallError,
    Internal,
    InvalidRequest,
    NotFound,
    Unavailable,
)

MAX_FRAME_BYTES = 64 * 1024
LENGTH = struct.Struct("<I")
_ERRORS: dict[str, type[GearfallError]] = {
    error.__name__: error
    for error in (Conflict, CorruptCheckpoint, InvalidRequest, NotFound, Unavailable)
}


class AttachRequest(msgspec.Struct, frozen=True):
    """Asks for a lease on a resident model."""

    model: str
    digest: str
    """Of the manifest that the caller expects."""
    holder: str
    """Who asks, for logs and status: a worker_id."""
    accepts_filling: bool = False
    """Whether memory that is still being filled will do."""


class AttachReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The lease (its descriptors travel beside it, the manifest's bytes behind it) or an error."""

    manifest_bytes: int = 0
    partitions: tuple[int, ...] = ()
    """Size of each partition; descriptors come in the same order."""
    error: str = ""
    kind: str = ""
    """Class name of the error in gearfall's tree."""
    is_filling: bool = False
    """Whether the memory is still being filled: `FillNews` follow behind the manifest."""

    @classmethod
    def refusal(cls, error: GearfallError) -> "AttachReply":
        """Return the reply that raises the same error at the client."""
        return cls(error=error.message, kind=type(error).__name__)

    def check(self) -> None:
        """Raise the error that the store refused with, if it did."""
        if self.error:
            raise _ERRORS.get(self.kind, Internal)(self.error)


class FillNews(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a load is, or how it ended: the last has `is_done` or an error."""

    verified_bytes: tuple[int, ...] = ()
    """Of each partition from its front on; what lies behind may be anything."""
    is_done: bool = False
    """All is verified, and nobody can change it any more."""
    error: str = ""
    kind: str = ""
    """Class name of the error in gearfall's tree."""

    @classmethod
    def failure(cls, error: GearfallError) -> "FillNews":
        """Return the news that raise the same error at the holder."""
        return cls(error=error.message, kind=type(error).__name__)

    def check(self) -> None:
        """Raise the error that the load ended with, if it did."""
        if self.error:
            raise _ERRORS.get(self.kind, Internal)(self.error)


async def write_frame(connection: socket.socket, message: msgspec.Struct) -> None:
    """Send one framed JSON message."""
    await asyncio.get_running_loop().sock_sendall(connection, pack_frame(message))


def pack_frame(message: msgspec.Struct) -> bytes:
    """Return a 4-byte little-endian length and the message's JSON."""
    body = msgspec.json.encode(message)
    return LENGTH.pack(len(body)) + body


async def read_request(connection: socket.socket) -> AttachRequest:
    """Read the client's request. Raises InvalidRequest when it is malformed, EOFError at EOF."""
    loop = asyncio.get_running_loop()
    (size,) = LENGTH.unpack(await read_exactly(loop, connection, LENGTH.size))
    if not 0 < size <= MAX_FRAME_BYTES:
        raise InvalidRequest(f"an attach request of {size} bytes")
    try:
        return msgspec.json.decode(await read_exactly(loop, connection, size), type=AttachRequest)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"malformed attach request: {error}") from None


async def read_exactly(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, size: int
) -> bytes:
    """Read so many bytes. Raises EOFError at EOF."""
    content = bytearray(size)
    view: Any = memoryview(content)
    done = 0
    while done < size:
        count = await loop.sock_recv_into(connection, view[done:])
        if count == 0:
            raise EOFError("the peer closed the connection")
        done += count
    return bytes(content)
