"""A neighbour's store as a source of bytes: bulk sockets that it opens for us over gRPC."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from gearfall.core.checkpoint.manifest import (
    FileEntry,
    Manifest,
    checksum,
    manifest_digest,
    parse_manifest,
)
from gearfall.core.errors import (
    CorruptCheckpoint,
    DeadlineExceeded,
    GearfallError,
    Internal,
    Unavailable,
)
from gearfall.core.generation.canary import parse_canary
from gearfall.core.ids import ModelName
from gearfall.infra.net.bulk_socket import BulkConnection
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_errors import error_from_rpc
from gearfall.pb import store_pb2
from gearfall.pb.store_pb2_grpc import StoreStub

if TYPE_CHECKING:
    from gearfall.pb.store_pb2_grpc import StoreAsyncStub

CONNECTIONS = 4
_CALL_S = 10.0
_CANARY_S = 120.0
"""The neighbour may have to compute it first, which takes seconds for each gigabyte."""


class NeighbourCheckpoint:
    """One model on another node. Close it when done."""

    def __init__(self, address: str, model: ModelName, digest: str) -> None:
        """`address`: host:port of the neighbour's store."""
        self._host = address.rpartition(":")[0].strip("[]")
        self._model = model
        self._channel = open_channel(address)
        self._stub: StoreAsyncStub = StoreStub(self._channel)
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="neighbour")
        self._idle: asyncio.Queue[BulkConnection | None] = asyncio.Queue()
        self.digest = digest
        self.manifest_json = b""
        self.manifest: Manifest

    async def open(self) -> None:
        """Read the manifest and connect.

        Raises NotFound when the neighbour has no bytes, Unavailable when it can't be reached,
        CorruptCheckpoint when it has another checkpoint under that name.
        """
        reply = await self._open_transfer(CONNECTIONS)
        self.manifest_json = reply.manifest
        if manifest_digest(reply.manifest) != self.digest:
            raise CorruptCheckpoint(f"{self._host} has another checkpoint as {self._model!r}")
        self.manifest = await asyncio.to_thread(parse_manifest, self.manifest_json)
        for token in reply.tokens:
            self._idle.put_nowait(await self._connect(reply.port, token))

    async def read_into(self, partition: int, offset_bytes: int, destination: memoryview) -> None:
        """Fill `destination` from a place in a partition; see `ByteSource`."""
        connection = await self._idle.get()
        try:
            if connection is None:
                reply = await self._open_transfer(1)
                connection = await self._connect(reply.port, reply.tokens[0])
            try:
                await self._read(connection, partition, offset_bytes, destination)
            except BaseException as error:
                # What is under way on it belongs to nobody now.
                connection.close()
                connection = None
                if isinstance(error, Unavailable):
                    self._forget_idle()
                raise
        finally:
            self._idle.put_nowait(connection)

    def _forget_idle(self) -> None:
        """Connect anew next time: what cut one off has mostly cut the others, and each tells late.

        An attempt at a part would be lost on each of them.
        """
        for _ in range(self._idle.qsize()):
            connection = self._idle.get_nowait()
            if connection is not None:
                connection.close()
            self._idle.put_nowait(None)

    async def read_file(self, entry: FileEntry) -> bytes:
        """Return one small file, checked. Raises CorruptCheckpoint."""
        request = store_pb2.ReadFileRequest(model=self._model, file=entry.name)
        try:
            reply = await self._stub.ReadFile(request, timeout=_CALL_S)
        except grpc.aio.AioRpcError as error:
            raise failure_of(error) from error
        content = reply.content
        if len(content) != entry.size_bytes or checksum(content) != entry.checksum:
            raise CorruptCheckpoint(f"{entry.name} is not what the manifest says")
        return content

    async def read_files(self) -> dict[str, bytes]:
        """Return every small file by name, checked. Raises CorruptCheckpoint."""
        return {entry.name: await self.read_file(entry) for entry in self.manifest.files}

    async def close(self) -> None:
        """Cut every connection."""
        while not self._idle.empty():
            connection = self._idle.get_nowait()
            if connection is not None:
                connection.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._channel.close()

    async def _open_transfer(self, connections: int) -> store_pb2.OpenTransferReply:
        request = store_pb2.OpenTransferRequest(
            model=self._model, digest=self.digest, connections=connections
        )
        try:
            return await self._stub.OpenTransfer(request, timeout=_CALL_S)
        except grpc.aio.AioRpcError as error:
            raise failure_of(error) from error

    async def _connect(self, port: int, token: bytes) -> BulkConnection:
        return await asyncio.to_thread(BulkConnection, self._host, port, token)

    async def _read(
        self,
        connection: BulkConnection,
        partition: int,
        offset_bytes: int,
        destination: memoryview,
    ) -> None:
        reading = asyncio.get_running_loop().run_in_executor(
            self._threads, connection.read_into, partition, offset_bytes, destination
        )
        try:
            await asyncio.shield(reading)
        except asyncio.CancelledError:
            connection.cut()
            await asyncio.wait((reading,))
            reading.exception()
            raise


async def read_canary(address: str, model: ModelName) -> bytes:
    """Return the canary that a neighbour's store has of a model, waiting while it is computed.

    Raises what the neighbour answers, CorruptCheckpoint for something else than a canary.
    """
    async with open_channel(address) as channel:
        stub: StoreAsyncStub = StoreStub(channel)
        request = store_pb2.ReadCanaryRequest(model=model)
        try:
            content = (await stub.ReadCanary(request, timeout=_CANARY_S)).content
        except grpc.aio.AioRpcError as error:
            raise failure_of(error) from error
    parse_canary(content)
    return content


def failure_of(error: grpc.aio.AioRpcError) -> GearfallError:
    """Return what a call to a neighbour failed with.

    One that dies in the middle of a call may end it as INTERNAL, or not at all: it is one that
    can't be reached, and another place is asked.
    """
    failure = error_from_rpc(error)
    is_gone = isinstance(failure, (DeadlineExceeded, Internal))
    return Unavailable(failure.message) if is_gone else failure
