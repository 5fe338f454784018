"""Frames on Unix stream sockets: 4-byte little-endian length, body, descriptors beside the header.

Both ends are the same program; a length is still checked before memory is set aside for it.
"""

import array
import asyncio
import os
import socket
from collections.abc import Iterator, Sequence

from gearfall.core.errors import Internal

HEADER_BYTES = 4
MAX_FRAME_BYTES = 64 << 20
"""More than any prompt, log and manifest together."""
MAX_DESCRIPTORS = 65
"""Most descriptors beside one frame: all partitions and one more; the kernel takes 253."""
_CUT = "the peer closed its end inside a frame"


def encode_frame(body: bytes) -> bytes:
    """Return header and body. Raises Internal when the body is too long for a frame."""
    return frame_header(body) + body


def frame_header(body: bytes) -> bytes:
    """Return the header of `body`. Raises Internal when it is too long for a frame."""
    check_length(len(body))
    return len(body).to_bytes(HEADER_BYTES, "little")


def check_length(size_bytes: int) -> None:
    """Raise Internal when no frame may be this long."""
    if size_bytes > MAX_FRAME_BYTES:
        raise Internal(f"a frame of {size_bytes} bytes is over the limit of {MAX_FRAME_BYTES}")


class FrameDecoder:
    """Cuts a byte stream, fed in any portions, into frame bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take in `data` and yield each body that is complete. Raises Internal on a bad length."""
        self._buffer += data
        while len(self._buffer) >= HEADER_BYTES:
            size = int.from_bytes(self._buffer[:HEADER_BYTES], "little")
            check_length(size)
            end = HEADER_BYTES + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER_BYTES:end])
            del self._buffer[:end]
            yield body


def send_header(sock: socket.socket, body: bytes, descriptors: Sequence[int]) -> None:
    """Send the header of `body` with copies of `descriptors`; the body itself must follow.

    Four bytes fit whatever the socket's buffer holds when nothing was sent before, so a
    non-blocking socket works as well. Raises OSError when the peer is gone.
    """
    if len(descriptors) > MAX_DESCRIPTORS:
        raise Internal(f"{len(descriptors)} descriptors are over the limit of {MAX_DESCRIPTORS}")
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    sent = sock.sendmsg([frame_header(body)], [rights] if descriptors else [])
    if sent != HEADER_BYTES:
        raise Internal(f"only {sent} bytes of a frame's header could be sent")


def receive_frame(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """Wait on a blocking socket for one frame; return body and descriptors, None at the end.

    The descriptors are the caller's to close. Raises Internal when the stream ends inside a frame.
    """
    header, descriptors = _receive_header(sock)
    if not header:
        return None
    header += _receive_exactly(sock, HEADER_BYTES - len(header))
    size = int.from_bytes(header, "little")
    check_length(size)
    return _receive_exactly(sock, size), descriptors


async def receive_frame_async(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """Receive a frame on a non-blocking socket; what follows it stays unread."""
    await _readable(sock)
    header, descriptors = _receive_header(sock)
    if not header:
        return None
    try:
        header += await _receive_exactly_async(sock, HEADER_BYTES - len(header))
        size = int.from_bytes(header, "little")
        check_length(size)
        return await _receive_exactly_async(sock, size), descriptors
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


async def _readable(sock: socket.socket) -> None:
    """Return when there is something to read, the end included."""
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    loop.add_reader(sock, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(sock)


async def writable(sock: socket.socket) -> None:
    """Return when something can be sent, whoever else watches the socket."""
    loop = asyncio.get_running_loop()
    is_writable = asyncio.Event()
    with sock.dup() as watched:
        loop.add_writer(watched, is_writable.set)
        try:
            await is_writable.wait()
        finally:
            loop.remove_writer(watched)


async def _receive_exactly_async(sock: socket.socket, size_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < size_bytes:
        data = await loop.sock_recv(sock, size_bytes - len(received))
        if not data:
            raise Internal(_CUT)
        received += data
    return received


def receive_some(sock: socket.socket, size_bytes: int) -> tuple[bytes, list[int]]:
    """Return up to `size_bytes` and the descriptors that came beside them, empty at the end.

    The kernel never gives the descriptors of two headers at once: they come in the frames' order.
    """
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, _flags, _address = sock.recvmsg(size_bytes, space, socket.MSG_CMSG_CLOEXEC)
    return data, _descriptors_in(ancillary)


def _receive_header(sock: socket.socket) -> tuple[bytes, list[int]]:
    return receive_some(sock, HEADER_BYTES)


def _descriptors_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return list(descriptors)


def _receive_exactly(sock: socket.socket, size_bytes: int) -> bytes:
    buffer = bytearray(size_bytes)
    view = memoryview(buffer)
    while view:
        received = sock.recv_into(view)
        if received == 0:
            raise Internal(_CUT)
        view = view[received:]
    return bytes(buffer)
