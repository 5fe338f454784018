"""The ways of `bench.tiers`: each brings the same bytes into memory that is there already."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import xxhash

from bench.raw_read import make_ready
from bench.tiers.servers import GRPC_METHOD, GRPC_OPTIONS, GRPC_REQUEST, MODEL, Places
from gearfall.core.checkpoint.manifest import Manifest
from gearfall.core.errors import CorruptCheckpoint, Unavailable
from gearfall.core.ids import ModelName
from gearfall.infra.net.bulk_socket import BulkConnection
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.pb import store_pb2
from gearfall.pb.store_pb2_grpc import StoreStub
from services.store.models.remote_checkpoint import open_remote
from services.store.sources.arrival import ByteSource, bring
from services.store.sources.neighbour import NeighbourCheckpoint

CONNECTIONS = 4
IN_FLIGHT = 12
"""As many as a store has."""
PART_BYTES = 4 << 20
RAW, MEMORY, BULK, GRPC = "raw socket", "memory", "neighbour, bulk", "neighbour, gRPC"
REMOTE = ("file", "http", "s3", BULK, GRPC)


class MemorySource:
    """No way at all: what a load costs where its bytes are at hand."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self._content = [
            np.frombuffer((checkpoint / entry.file).read_bytes(), np.uint8)
            for entry in manifest.partitions
        ]

    async def read_into(self, partition: int, offset_bytes: int, destination: memoryview) -> None:
        """Fill `destination` in a thread."""
        content = self._content[partition][offset_bytes:][: len(destination)]
        target = np.frombuffer(destination, np.uint8)
        await asyncio.to_thread(np.copyto, target, content)


class GrpcSource:
    """Ranges as streams of bytes over several gRPC connections, without a serialiser."""

    def __init__(self, address: str) -> None:
        # A pool of its own each, or gRPC makes one connection of them.
        options = (*GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        self._channels = [
            grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)
        ]
        self._next = 0

    async def read_into(self, partition: int, offset_bytes: int, destination: memoryview) -> None:
        """Fill `destination` message by message."""
        self._next += 1
        channel = self._channels[self._next % CONNECTIONS]
        request = GRPC_REQUEST.pack(partition, offset_bytes, len(destination))
        done = 0
        read: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(GRPC_METHOD)
        async for message in read(request):
            destination[done : done + len(message)] = message
            done += len(message)
        if done != len(destination):
            raise Unavailable(f"{done} bytes came instead of {len(destination)}")

    async def close(self) -> None:
        """Close every connection."""
        for channel in self._channels:
            await channel.close()


@contextlib.asynccontextmanager
async def opened(
    way: str, places: Places, checkpoint: Path, manifest: Manifest
) -> AsyncIterator[ByteSource]:
    """Open one way for one measurement."""
    if way in places.urls:
        yield await open_remote(places.urls[way])
    elif way == MEMORY:
        yield MemorySource(checkpoint, manifest)
    elif way == GRPC:
        source = GrpcSource(places.grpc_address)
        yield source
        await source.close()
    else:
        neighbour = NeighbourCheckpoint(places.store_address, ModelName(MODEL), places.digest)
        await neighbour.open()
        yield neighbour
        await neighbour.close()


async def transport(source: ByteSource, manifest: Manifest, memories: list[memoryview]) -> None:
    """Fetch every chunk as a store does, check it, write nothing."""
    chunks = iter(_chunks(manifest))
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        loop = asyncio.get_running_loop()

        async def work() -> None:
            for partition, offset, size, digest in chunks:
                with memories[partition][offset : offset + size] as place:
                    for start in range(0, size, PART_BYTES):
                        with place[start : start + PART_BYTES] as part:
                            await source.read_into(partition, offset + start, part)
                    found = await loop.run_in_executor(threads, xxhash.xxh3_64_intdigest, place)
                if found != digest:
                    raise CorruptCheckpoint(f"other bytes at {offset} of partition {partition}")

        async with asyncio.TaskGroup() as tasks:
            for _ in range(IN_FLIGHT):
                tasks.create_task(work())


async def whole_load(source: ByteSource, manifest: Manifest, directory: Path) -> tuple[int, ...]:
    """Bring every chunk to SSD and into memory that was kept ready; return its descriptors."""
    ready = {entry.size_bytes: make_ready(entry.size_bytes) for entry in manifest.partitions}

    async def go_on() -> None:
        return

    return await bring(
        manifest,
        source,
        directory,
        is_pooled=True,
        report=lambda _: None,
        gate=go_on,
        allocate=ready.__getitem__,
    )


async def raw_tokens(places: Places) -> tuple[int, list[bytes]]:
    """Return port and tokens for connections to the store's bulk socket."""
    async with open_channel(places.store_address) as channel:
        reply = await StoreStub(channel).OpenTransfer(
            store_pb2.OpenTransferRequest(
                model=MODEL, digest=places.digest, connections=CONNECTIONS
            )
        )
        return reply.port, list(reply.tokens)


def raw_read(port: int, tokens: list[bytes], memory: memoryview) -> None:
    """Read partition 0 in one request a connection, each in its thread, nothing checked."""
    size = -(-len(memory) // len(tokens))

    def read(number: int, token: bytes) -> None:
        with (
            contextlib.closing(BulkConnection("127.0.0.1", port, token)) as connection,
            memory[number * size : (number + 1) * size] as part,
        ):
            connection.read_into(0, number * size, part)

    with ThreadPoolExecutor(len(tokens)) as threads:
        list(threads.map(read, range(len(tokens)), tokens))


def _chunks(manifest: Manifest) -> Iterator[tuple[int, int, int, int]]:
    for number, entry in enumerate(manifest.partitions):
        for index, digest in enumerate(entry.chunk_digests()):
            offset = index * entry.chunk_bytes
            yield number, offset, min(entry.chunk_bytes, entry.size_bytes - offset), digest
