"""Checkpoints below a URL, and servers that cut, stall, lie or serve something else half way."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearfall.core.checkpoint.manifest import MANIFEST_FILE, Manifest
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest, NotFound, Unavailable
from services.store.models.remote_checkpoint import RemoteCheckpoint, open_remote
from services.store.sources.arrival import bring
from tests.gearfall.infra.web_servers import WebServer, web_server
from tests.services.store.checkpoints import many_tensors, write_checkpoint

DEADLINE_S = 20.0
PARTITION = "partition-0.bin"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_checkpoint(tmp_path / "model", many_tensors(9))


@pytest.fixture
def web(tmp_path: Path, manifest: Manifest) -> Iterator[WebServer]:
    with web_server(tmp_path / "model") as server:
        yield server


async def arrive(checkpoint: RemoteCheckpoint, directory: Path) -> bytes:
    await asyncio.to_thread(directory.mkdir)

    async def gate() -> None:
        pass

    async with asyncio.timeout(DEADLINE_S):
        await bring(
            checkpoint.manifest,
            checkpoint,
            directory,
            is_pooled=False,
            report=lambda size: None,
            gate=gate,
            pauses_s=(0.0, 0.0, 0.0),
        )
    return (directory / PARTITION).read_bytes()


@pytest.mark.parametrize("scheme", ["http", "file"])
async def test_the_whole_arrives_byte_for_byte(web: WebServer, tmp_path: Path, scheme: str):
    model = tmp_path / "model"
    checkpoint = await open_remote(web.url if scheme == "http" else f"{model.as_uri()}/")
    assert await arrive(checkpoint, tmp_path / "in") == (model / PARTITION).read_bytes()
    files = await checkpoint.read_files()
    assert files["config.json"] == (model / "config.json").read_bytes()
    assert files.keys() == {entry.name for entry in checkpoint.manifest.files}


async def test_a_cut_is_taken_up_at_its_part(web: WebServer, tmp_path: Path):
    checkpoint = await open_remote(web.url)
    web.faults.requests.clear()
    web.faults.cut_after_bytes, web.faults.cuts_left = 1000, 2
    content = await arrive(checkpoint, tmp_path / "in")
    assert content == (tmp_path / "model" / PARTITION).read_bytes()
    ranges = [range_ for _, range_ in web.faults.requests]
    assert len(ranges) == 5
    assert len(set(ranges)) == 3


async def test_one_that_always_cuts_is_given_up(web: WebServer, tmp_path: Path):
    checkpoint = await open_remote(web.url)
    web.faults.cut_after_bytes = 1000
    with pytest.raises(Unavailable):
        await arrive(checkpoint, tmp_path / "in")


async def test_one_that_stalls_is_given_up(web: WebServer, tmp_path: Path):
    checkpoint = await open_remote(web.url, stall_s=0.1)
    web.faults.stall = threading.Event()
    with pytest.raises(Unavailable):
        await arrive(checkpoint, tmp_path / "in")


async def test_another_object_half_way_is_noticed(web: WebServer, tmp_path: Path):
    checkpoint = await open_remote(web.url)
    web.faults.tag = "v2"
    with pytest.raises(CorruptCheckpoint, match="replaced"):
        await arrive(checkpoint, tmp_path / "in")


async def test_other_bytes_under_the_same_tag_are_noticed(web: WebServer, tmp_path: Path):
    checkpoint = await open_remote(web.url)
    content = bytearray((tmp_path / "model" / PARTITION).read_bytes())
    content[5 * 2**20] ^= 1
    web.faults.replace[PARTITION] = bytes(content)
    with pytest.raises(CorruptCheckpoint, match="chunk 1 "):
        await arrive(checkpoint, tmp_path / "in")


async def test_a_length_that_is_a_lie_is_refused_before_a_byte_is_read(web: WebServer):
    web.faults.extra_length = 4096
    with pytest.raises(Unavailable):
        await open_remote(web.url, stall_s=0.2)
    web.faults.extra_length = 0
    web.faults.replace[PARTITION] = bytes(4096)
    with pytest.raises(CorruptCheckpoint, match="by the server's word"):
        await open_remote(web.url)
    assert not any(file == PARTITION for file, _ in web.faults.requests)


async def test_a_small_file_with_other_bytes_is_refused(web: WebServer):
    web.faults.replace["config.json"] = b"{}"
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        await (await open_remote(web.url)).read_files()


async def test_where_no_checkpoint_is(web: WebServer, tmp_path: Path):
    web.faults.replace[MANIFEST_FILE] = b'{"format": "gearfall", "format_version": 1}'
    with pytest.raises(CorruptCheckpoint):
        await open_remote(web.url)
    with pytest.raises(NotFound):
        await open_remote(f"{web.url}/nothing")
    with pytest.raises(InvalidRequest):
        await open_remote("ftp://host/model")
