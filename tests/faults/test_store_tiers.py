"""What goes wrong between tiers: full disks, races, dead processes. Nothing lost, store alive."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gearfall.core.errors import InvalidRequest, Overloaded, Unavailable
from gearfall.core.ids import ModelName
from gearfall.infra.state.memory_state import MemoryStateServer
from gearfall.pb import common_pb2
from gearfall.pb import store_pb2 as pb
from tests.gearfall.infra.web_servers import WebServer, web_server
from tests.services.store.checkpoints import many_tensors, write_checkpoint
from tests.services.store.source_directories import write_source
from tests.services.store.stores import TIMEOUT_S, RunningStore, running_store

MIB = 2**20

FULL_DISK = textwrap.dedent(
    """
    import asyncio, os, sys
    from pathlib import Path
    from gearfall.core.errors import Overloaded
    from services.store.sources.arrival import bring
    from services.store.models.catalogue import Catalogue
    from services.store.models.remote_checkpoint import open_remote

    disk, url = Path(sys.argv[1]), sys.argv[2]

    async def go_on():
        pass

    async def arrive(remote, is_pooled):
        incoming = disk / "incoming"
        incoming.mkdir()
        try:
            await bring(remote.manifest, remote, incoming, is_pooled=is_pooled,
                        report=lambda size: None, gate=go_on)
        finally:
            for entry in incoming.iterdir():
                entry.unlink()
            incoming.rmdir()

    async def main():
        remote = await open_remote(url)
        catalogue = Catalogue(disk)
        catalogue.open()
        files = await remote.read_files()
        for attempt in (
            lambda: arrive(remote, True),
            lambda: arrive(remote, False),
            lambda: asyncio.to_thread(catalogue.put, "m", remote.manifest_json,
                                      files | {"big": bytes(2**19)}, url),
            lambda: asyncio.to_thread(catalogue.put, "m", bytes(2**19), files, url),
        ):
            try:
                await attempt()
            except Overloaded as error:
                print(error)
            else:
                sys.exit("no error")
            assert sorted(entry.name for entry in disk.iterdir()) == ["remote"]
            assert list((disk / "remote").iterdir()) == []
        catalogue.put("m", remote.manifest_json, files, url)
        assert catalogue.models["m"].digest == remote.digest

    asyncio.run(main())
    """
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", many_tensors(2))
    return tmp_path / "model"


@pytest.fixture
def web(model: Path) -> Iterator[WebServer]:
    with web_server(model) as server:
        yield server


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[RunningStore]:
    async with running_store(tmp_path / "store", dram_bytes=3 * MIB) as store:
        yield store


def test_a_disk_that_fills_while_a_model_arrives(model: Path, tmp_path: Path):
    """On a real file system of 256 KiB, in a mount namespace of its own."""
    unshare = shutil.which("unshare")
    probe = [unshare or "unshare", "--user", "--map-root-user", "--mount"]
    if unshare is None or subprocess.run([*probe, "true"], check=False).returncode != 0:
        pytest.skip("no user namespaces here: a small file system can't be mounted")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount_and_run = 'mount -t tmpfs -o size=256k tmpfs "$1" && shift && exec "$@"'
    command: list[str | Path] = [*probe, "sh", "-c", mount_and_run, "sh", disk]
    command += [sys.executable, "-c", FULL_DISK, disk, model.as_uri()]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("no room") == 4


async def test_many_loads_of_a_model_that_is_elsewhere_are_one(store: RunningStore, web: WebServer):
    await store.register("m", web.url)
    results = await asyncio.gather(*(store.load("m") for _ in range(50)))
    assert len({result[-1].digest for result in results}) == 1
    asked = [file for file, _ in web.faults.requests if file.startswith("partition")]
    assert len(asked) == 1


async def test_evictions_race_leases(store: RunningStore, tmp_path: Path):
    """Room for one of two models: who gets a lease has the bytes, whatever is evicted meanwhile."""
    contents = {}
    for seed, name in enumerate(("a", "b")):
        await store.register(name, write_source(tmp_path / name, many_tensors(2, seed=9 * seed)))
        contents[name] = store.service.ssd.get(ModelName(name)).partition_path(0).read_bytes()
    leases = 0

    async def lease_again(name: str) -> None:
        nonlocal leases
        for _ in range(20):
            try:
                with await store.lease(name) as lease:
                    await asyncio.sleep(0)
                    content = os.pread(lease.partition_fds[0], lease.partition_sizes[0], 0)
            except (Overloaded, Unavailable):
                continue
            assert content == contents[name]
            leases += 1

    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*(lease_again(name) for name in "abab"))
    assert leases
    store.service.pool.check()


ATTACH = """
import json, socket, struct, sys
path, request, cut = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])
connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
connection.sendall((struct.pack("<I", len(request)) + request)[:cut])
print("sent", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("cut", [2, 10, 1000])
async def test_a_worker_killed_while_it_attaches(store: RunningStore, tmp_path: Path, cut: int):
    await store.register("m", write_source(tmp_path / "src"))
    done = (await store.load("m"))[-1]
    request = json.dumps({"model": "m", "digest": done.digest, "holder": "worker"})
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ATTACH, done.attach_socket, request, str(cut)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None
    assert await worker.stdout.readline() == b"sent\n"
    worker.kill()
    await worker.wait()
    async with asyncio.timeout(TIMEOUT_S):
        while store.service.pool.holders(ModelName("m")):  # noqa: ASYNC110 - the kernel tells the store only
            await asyncio.sleep(0.005)
    await store.call("UnloadModel", pb.UnloadModelRequest(model="m"))
    with await store.lease("m"):
        store.service.pool.check()


async def test_larger_than_a_tier_is_said_before_a_byte_is_read(tmp_path: Path):
    write_checkpoint(tmp_path / "big", many_tensors(4))
    with web_server(tmp_path / "big") as web:
        for dram_bytes, ssd_bytes, flag in (
            (MIB, 0, "--dram-bytes"),
            (8 * MIB, MIB, "--ssd-bytes"),
        ):
            directory = tmp_path / flag
            async with running_store(
                directory, dram_bytes=dram_bytes, ssd_bytes=ssd_bytes
            ) as store:
                await store.register("big", web.url)
                with pytest.raises(InvalidRequest, match=flag):
                    await store.load("big")
                assert store.service.pool.used_bytes == store.service.room.used_bytes == 0
                await store.register("good", write_source(tmp_path / f"good{flag}"))
                assert (await store.load("good"))[-1].tier == common_pb2.TIER_DRAM
        assert not any(file.startswith("partition") for file, _ in web.faults.requests)


async def test_a_server_that_hangs_up_and_recovers(web: WebServer, tmp_path: Path):
    """The load goes on by itself: nobody asks again."""
    async with running_store(tmp_path / "store") as store:
        await store.register("m", web.url)
        web.faults.cut_after_bytes = 1000
        load = asyncio.create_task(store.load("m"))
        assert await asyncio.to_thread(web.faults.partition_asked.wait, TIMEOUT_S)
        assert store.service.loader.is_loading(ModelName("m"))
        web.faults.cut_after_bytes = None
        assert (await load)[-1].done
        assert [entry.name for entry in (tmp_path / "store/models").iterdir()] == ["m"]


async def test_a_neighbour_that_dies_half_way_is_replaced_by_the_url(
    web: WebServer, tmp_path: Path
):
    """Two places have it: the one that dies in the middle of a chunk costs time, nothing else."""
    server = MemoryStateServer()
    async with running_store(tmp_path / "two", node="node-2", server=server) as two:
        async with running_store(tmp_path / "one", node="node-1", server=server) as one:
            await one.register("m", web.url)
            await one.load("m")
            await two.wait_model("m", ("node-1",))
            first, asked = one.service.transfers, asyncio.Event()
            loading = asyncio.create_task(follow_until_bytes(two, asked))
            await asyncio.wait_for(asked.wait(), TIMEOUT_S)
            first.close()
        assert (await loading).done
        content = (tmp_path / "two/models/m/partition-0.bin").read_bytes()
        assert content == (tmp_path / "model/partition-0.bin").read_bytes()
        two.service.pool.check()


async def follow_until_bytes(store: RunningStore, asked: asyncio.Event) -> pb.LoadProgress:
    """Load a model and say when its load has begun."""
    last = pb.LoadProgress()
    async for progress in store.stub.LoadModel(pb.LoadModelRequest(model="m"), timeout=TIMEOUT_S):
        asked.set()
        last = progress
    return last
