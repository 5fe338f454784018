"""Leases on models in the node's DRAM pool: descriptors over a Unix socket, mapped without a copy.

Client and framing of the attach protocol (docs/protocol.md), served by the store's attach_server.
The mapping half (`map_partition`) is all that an engine process needs; nothing here imports grpc.
"""

import array
import asyncio
import mmap
import os
import socket
import struct
from functools import cached_property
from types import TracebackType
from typing import Any, NoReturn

import msgspec

from gearfall.core.errors import (
    Conflict,
    CorruptCheckpoint,
    DeadlineExceeded,
    GearfallError,
    Internal,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from gearfall.core.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_PARTITIONS,
    Manifest,
    manifest_digest,
    parse_manifest,
)

DEFAULT_TIMEOUT_S = 5.0
MAX_FRAME_BYTES = 64 * 1024
_LENGTH = struct.Struct("<I")
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


class PoolLease:
    """A lease on one resident model: its partitions stay in memory, unchanged, until `close`.

    With a `news_fd` the model is still being loaded; what is verified stays unchanged. The store
    sees the end of the holder's process as the end of the lease.
    """

    def __init__(
        self,
        connection: socket.socket,
        partition_fds: tuple[int, ...],
        partition_sizes: tuple[int, ...],
        manifest_json: bytes,
        *,
        is_filling: bool = False,
    ) -> None:
        """Own `connection` and `partition_fds`."""
        self._is_filling = is_filling
        self._connection = connection
        self.partition_fds = partition_fds
        """To read by; once the model is loaded, sealed against writing, growing and shrinking."""
        self.partition_sizes = partition_sizes
        self.manifest_json = manifest_json

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, parsed when it is first asked for: a lease alone needs none of it.

        Raises CorruptCheckpoint for one that breaks a rule of the format.
        """
        return parse_manifest(self.manifest_json)

    @property
    def news_fd(self) -> int | None:
        """Where framed `FillNews` come for one reader; None for a model that is resident.

        Whoever has a copy of it keeps the lease alive.
        """
        return self._connection.fileno() if self._is_filling else None

    def close(self) -> None:
        """End the lease and close the descriptors; mappings made from them stay. Idempotent."""
        self._connection.close()
        fds, self.partition_fds = self.partition_fds, ()
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> "PoolLease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


async def take_lease(
    socket_path: str,
    model: str,
    digest: str,
    holder: str,
    *,
    accepts_filling: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> PoolLease:
    """Take a lease on `model`, resident with manifest `digest`, from the store at `socket_path`.

    With `accepts_filling` also on a model that is being loaded; the lease's `news_fd` tells.
    Raises Unavailable when the store can't be reached or the model is not (or no longer) in the
    pool: call LoadModel and try again. Conflict when other bytes are resident under that name,
    DeadlineExceeded after `timeout_s`.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    fds: list[int] = []
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(connection, socket_path)
            await write_frame(connection, AttachRequest(model, digest, holder, accepts_filling))
            return await _receive_lease(connection, digest, fds)
    except BaseException as error:
        connection.close()
        for fd in fds:
            os.close(fd)
        _raise_gearfall(error, socket_path)


def map_partition(fd: int, size_bytes: int, *, is_private: bool = True) -> mmap.mmap:
    """Map a leased partition without a copy. The mapping outlives the descriptor and the lease.

    Private: writes, which torch's tensors permit, would stay in this process alone. Otherwise
    shared and read-only, as a device driver pins it.
    """
    found_bytes = os.fstat(fd).st_size
    if found_bytes != size_bytes:
        raise CorruptCheckpoint(f"a partition of {size_bytes} bytes came with {found_bytes}")
    if not is_private:
        return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    return mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)


async def write_frame(connection: socket.socket, message: msgspec.Struct) -> None:
    """Send one framed JSON message."""
    await asyncio.get_running_loop().sock_sendall(connection, pack_frame(message))


def pack_frame(message: msgspec.Struct) -> bytes:
    """Return a 4-byte little-endian length and the message's JSON."""
    body = msgspec.json.encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_request(connection: socket.socket) -> AttachRequest:
    """Read the client's request. Raises InvalidRequest when it is malformed, EOFError at EOF."""
    loop = asyncio.get_running_loop()
    (size,) = _LENGTH.unpack(await _read_exactly(loop, connection, _LENGTH.size))
    if not 0 < size <= MAX_FRAME_BYTES:
        raise InvalidRequest(f"an attach request of {size} bytes")
    try:
        return msgspec.json.decode(await _read_exactly(loop, connection, size), type=AttachRequest)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"malformed attach request: {error}") from None


async def _receive_lease(connection: socket.socket, digest: str, fds: list[int]) -> PoolLease:
    loop = asyncio.get_running_loop()
    head = await _read_with_fds(loop, connection, fds)
    head += await _read_exactly(loop, connection, _LENGTH.size - len(head))
    (size,) = _LENGTH.unpack(head)
    if not 0 < size <= MAX_FRAME_BYTES:
        raise Internal(f"the store answered with a frame of {size} bytes")
    reply = msgspec.json.decode(await _read_exactly(loop, connection, size), type=AttachReply)
    if reply.error:
        raise _ERRORS.get(reply.kind, Internal)(reply.error)
    if not 0 < reply.manifest_bytes <= MAX_MANIFEST_BYTES or len(fds) != len(reply.partitions):
        raise Internal("the store answered with an incomplete lease")
    manifest_json = await _read_exactly(loop, connection, reply.manifest_bytes)
    if manifest_digest(manifest_json) != digest:
        raise CorruptCheckpoint("the leased manifest is not the one that was asked for")
    lease = PoolLease(
        connection, tuple(fds), reply.partitions, manifest_json, is_filling=reply.is_filling
    )
    expected = _partition_sizes(manifest_json)
    if reply.partitions != expected:
        raise CorruptCheckpoint("the leased partitions are not those of the manifest")
    return lease


class _Partition(msgspec.Struct):
    size_bytes: int


class _Partitions(msgspec.Struct):
    """The one part of a manifest that a lease is held against; the rest is skipped over."""

    partitions: tuple[_Partition, ...]


def _partition_sizes(manifest_json: bytes) -> tuple[int, ...]:
    try:
        found = msgspec.json.decode(manifest_json, type=_Partitions)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the leased manifest does not decode: {error}") from None
    return tuple(partition.size_bytes for partition in found.partitions)


async def _read_with_fds(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, fds: list[int]
) -> bytes:
    """Read up to a frame's length and put the descriptors that come beside it into `fds`."""
    slots = array.array("i")
    room = socket.CMSG_SPACE(MAX_PARTITIONS * slots.itemsize)
    while True:
        try:
            data, ancillary, _, _ = connection.recvmsg(_LENGTH.size, room, socket.MSG_CMSG_CLOEXEC)
            break
        except BlockingIOError:
            await _wait_readable(loop, connection)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            slots.frombytes(content[: len(content) - len(content) % slots.itemsize])
    fds.extend(slots)
    if not data:
        raise EOFError("the store closed the connection")
    return data


async def _wait_readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    readable: asyncio.Future[None] = loop.create_future()
    fd = connection.fileno()
    loop.add_reader(fd, _resolve, readable)
    try:
        await readable
    finally:
        loop.remove_reader(fd)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _read_exactly(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, size: int
) -> bytes:
    content = bytearray(size)
    view: Any = memoryview(content)
    done = 0
    while done < size:
        count = await loop.sock_recv_into(connection, view[done:])
        if count == 0:
            raise EOFError("the peer closed the connection")
        done += count
    return bytes(content)


def _raise_gearfall(error: BaseException, socket_path: str) -> NoReturn:
    store = f"the store at {socket_path}"
    if isinstance(error, TimeoutError):
        raise DeadlineExceeded(f"{store} did not answer in time") from error
    if isinstance(error, (OSError, EOFError)):
        raise Unavailable(f"{store} cannot be reached: {error}") from error
    if isinstance(error, (msgspec.MsgspecError, RecursionError)):
        raise Internal(f"{store} answered with a malformed frame: {error}") from error
    raise error
