"""Leases over a real socket: mapping without a copy, refusal, hostile peers, dead holders."""

import asyncio
import contextlib
import fcntl
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from gearfall.core.checkpoint.manifest import checksum, manifest_bytes, manifest_digest
from gearfall.core.errors import (
    Conflict,
    CorruptCheckpoint,
    DeadlineExceeded,
    GearfallError,
    Internal,
    Unavailable,
)
from gearfall.core.ids import ModelName
from gearfall.infra.memory.pool_lease import map_partition, take_lease
from services.store.attach_server import AttachServer
from services.store.tiers.pool import Pool, Resident
from tests.gearfall.core.checkpoint.test_manifest import sound_manifest

NAME = ModelName("tiny")
MANIFEST = manifest_bytes(sound_manifest())
DIGEST = manifest_digest(MANIFEST)
SIZES = tuple(partition.size_bytes for partition in sound_manifest().partitions)
DEADLINE_S = 20.0

HOLDER = """
import asyncio, sys
from gearfall.infra.memory.pool_lease import take_lease
async def hold(path, digest):
    lease = await take_lease(path, "tiny", digest, "doomed")
    assert "grpc" not in sys.modules
    print("held", flush=True)
    await asyncio.Event().wait()
asyncio.run(hold(*sys.argv[1:]))
"""


def sealed_memory(size_bytes: int, fill: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, fill * (size_bytes // len(fill)))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    return fd


class WatchedPool(Pool):
    """A pool that tells when a lease ended."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self.released = asyncio.Event()

    def release(self, model: ModelName, holder: str) -> None:
        super().release(model, holder)
        self.released.set()


def filled_pool() -> WatchedPool:
    pool = WatchedPool(2**20)
    fds = tuple(sealed_memory(size, bytes([65 + i])) for i, size in enumerate(SIZES))
    pool.reserve(NAME, sum(SIZES))
    pool.commit(Resident(NAME, DIGEST, MANIFEST, fds, SIZES))
    return pool


@contextlib.asynccontextmanager
async def serving(pool: Pool, directory: Path) -> AsyncIterator[AttachServer]:
    server = AttachServer(pool, directory / "attach")
    server.open()
    task = asyncio.create_task(server.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield server
    finally:
        task.cancel()
        await asyncio.wait((task,))
        server.close()
        pool.close()


async def check_lease(directory: Path) -> None:
    pool = filled_pool()
    async with serving(pool, directory) as server:
        lease = await take_lease(str(server.path), NAME, DIGEST, "worker")
        assert pool.holders(NAME) == ("worker",)
        assert lease.manifest == sound_manifest()
        assert lease.partition_sizes == SIZES
        assert all(not os.get_inheritable(fd) for fd in lease.partition_fds)
        mappings = [
            map_partition(fd, size)
            for fd, size in zip(lease.partition_fds, lease.partition_sizes, strict=True)
        ]
        with pytest.raises(Conflict):
            pool.drop(NAME)
        lease.close()
        lease.close()
        await pool.released.wait()
        assert not pool.holders(NAME)
        assert pool.drop(NAME) == sum(SIZES)
        for i, mapping in enumerate(mappings):
            assert mapping[:] == bytes([65 + i]) * SIZES[i]
            mapping.close()


async def test_a_lease_maps_the_pool_and_keeps_it(tmp_path: Path):
    await check_lease(tmp_path)


def test_a_lease_works_on_uvloop(tmp_path: Path):
    uvloop.run(check_lease(tmp_path))


async def test_writes_stay_private_and_the_pool_unwritable(tmp_path: Path):
    pool = filled_pool()
    async with serving(pool, tmp_path) as server:
        first = await take_lease(str(server.path), NAME, DIGEST, "one")
        second = await take_lease(str(server.path), NAME, DIGEST, "two")
        with first, second:
            mine = map_partition(first.partition_fds[0], SIZES[0])
            mine[:3] = b"new"
            assert map_partition(second.partition_fds[0], SIZES[0])[:3] == b"AAA"
            with pytest.raises(PermissionError):
                mmap.mmap(first.partition_fds[0], SIZES[0])
            with pytest.raises(PermissionError):
                os.pwrite(first.partition_fds[0], b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(first.partition_fds[0], 0)
            with pytest.raises(CorruptCheckpoint):
                map_partition(first.partition_fds[0], SIZES[0] + 4096)


async def test_a_killed_holder_loses_its_lease(tmp_path: Path):
    pool = filled_pool()
    async with serving(pool, tmp_path) as server:
        holder = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLDER, str(server.path), DIGEST, stdout=subprocess.PIPE
        )
        try:
            assert holder.stdout is not None
            assert await holder.stdout.readline() == b"held\n"
            assert pool.holders(NAME) == ("doomed",)
        finally:
            holder.send_signal(signal.SIGKILL)
            await holder.wait()
        await pool.released.wait()
        assert not pool.holders(NAME)
        assert pool.drop(NAME)


@pytest.mark.parametrize(
    ("model", "digest", "error"),
    [("absent", DIGEST, Unavailable), (NAME, "0" * 32, Conflict), ("../x", DIGEST, Unavailable)],
)
async def test_what_is_not_there_is_refused(
    tmp_path: Path, model: str, digest: str, error: type[GearfallError]
):
    pool = filled_pool()
    async with serving(pool, tmp_path) as server:
        with pytest.raises(error):
            await take_lease(str(server.path), model, digest, "worker")
        with await take_lease(str(server.path), NAME, DIGEST, "worker"):
            assert pool.holders(NAME) == ("worker",)


async def test_no_store_is_unavailable(tmp_path: Path):
    with pytest.raises(Unavailable):
        await take_lease(str(tmp_path / "nobody.sock"), NAME, DIGEST, "worker")


@pytest.mark.parametrize(
    "sent", [b"", b"\1", struct.pack("<I", 2**31), struct.pack("<I", 4) + b"nope", bytes(8)]
)
async def test_a_client_that_talks_nonsense_harms_nobody(tmp_path: Path, sent: bytes):
    pool = filled_pool()
    async with serving(pool, tmp_path) as server:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            await loop.sock_connect(client, str(server.path))
            await loop.sock_sendall(client, sent)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while await loop.sock_recv(client, 4096):
                    pass
        with await take_lease(str(server.path), NAME, DIGEST, "worker"):
            assert pool.holders(NAME) == ("worker",)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", Unavailable),
        (struct.pack("<I", 2**31), Internal),
        (struct.pack("<I", 4) + b"nope", Internal),
        (struct.pack("<I", 2) + b"{}", Internal),
        (struct.pack("<I", 37) + b'{"manifest_bytes":2,"partitions":[0]}', Internal),
    ],
)
async def test_a_store_that_talks_nonsense_is_an_error(
    tmp_path: Path, answer: bytes, error: type[GearfallError]
):
    async def answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        writer.write(answer)
        writer.close()

    path = str(tmp_path / "fake.sock")
    async with await asyncio.start_unix_server(answer_and_close, path):
        with pytest.raises(error):
            await take_lease(path, NAME, DIGEST, "worker")


async def test_a_silent_store_is_a_deadline(tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "silent.sock"))
        listener.listen()
        with pytest.raises(DeadlineExceeded):
            await take_lease(str(tmp_path / "silent.sock"), NAME, DIGEST, "worker", timeout_s=0.05)


async def test_the_socket_is_private(tmp_path: Path):
    async with serving(filled_pool(), tmp_path) as server:
        assert server.path.parent.stat().st_mode & 0o777 == 0o700


def test_the_checksum_is_xxh3_64():
    assert checksum(b"") == "2d06800538d394c2"
