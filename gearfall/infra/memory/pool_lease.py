"""Leases on models in the node's DRAM pool: descriptors over a Unix socket, mapped without a copy.

Client of the attach protocol (docs/protocol.md), served by the store's attach_server.
The mapping half (`map_partition`) is all that an engine process needs; nothing here imports grpc.
"""

import array
import asyncio
import mmap
import os
import socket
from functools import cached_property
from types import TracebackType
from typing import NoReturn

import msgspec

from gearfall.core.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_PARTITIONS,
    Manifest,
    manifest_digest,
    parse_manifest,
)
from gearfall.core.errors import (
    CorruptCheckpoint,
    DeadlineExceeded,
    Internal,
    Unavailable,
)
from gearfall.infra.memory.attach_protocol import (
    LENGTH,
    MAX_FRAME_BYTES,
    AttachReply,
    AttachRequest,
    read_exactly,
    write_frame,
)

DEFAULT_TIMEOUT_S = 5.0


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


async def _receive_lease(connection: socket.socket, digest: str, fds: list[int]) -> PoolLease:
    loop = asyncio.get_running_loop()
    head = await _read_with_fds(loop, connection, fds)
    head += await read_exactly(loop, connection, LENGTH.size - len(head))
    (size,) = LENGTH.unpack(head)
    if not 0 < size <= MAX_FRAME_BYTES:
        raise Internal(f"the store answered with a frame of {size} bytes")
    reply = msgspec.json.decode(await read_exactly(loop, connection, size), type=AttachReply)
    reply.check()
    if not 0 < reply.manifest_bytes <= MAX_MANIFEST_BYTES or len(fds) != len(reply.partitions):
        raise Internal("the store answered with an incomplete lease")
    manifest_json = await read_exactly(loop, connection, reply.manifest_bytes)
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
            data, ancillary, _, _ = connection.recvmsg(LENGTH.size, room, socket.MSG_CMSG_CLOEXEC)
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


def _raise_gearfall(error: BaseException, socket_path: str) -> NoReturn:
    store = f"the store at {socket_path}"
    if isinstance(error, TimeoutError):
        raise DeadlineExceeded(f"{store} did not answer in time") from error
    if isinstance(error, (OSError, EOFError)):
        raise Unavailable(f"{store} cannot be reached: {error}") from error
    if isinstance(error, (msgspec.MsgspecError, RecursionError)):
        raise Internal(f"{store} answered with a malformed frame: {error}") from error
    raise error
