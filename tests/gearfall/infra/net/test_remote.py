"""Remote directories: exact ranges of one version, and a typed error for all else."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearfall.core.errors import CorruptCheckpoint, InvalidRequest, NotFound, Unavailable
from gearfall.infra.net.remote import ObjectVersion, RemoteDirectory, is_url
from tests.gearfall.infra.web_servers import WebServer, web_server

CONTENT = bytes(range(256)) * 64


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "f.bin").write_bytes(CONTENT)
    (tmp_path / "empty").write_bytes(b"")
    return tmp_path


@pytest.fixture
def web(directory: Path) -> Iterator[WebServer]:
    with web_server(directory) as server:
        yield server


@pytest.fixture(params=["http", "file"])
def remote(request: pytest.FixtureRequest, directory: Path) -> RemoteDirectory:
    if request.param == "file":
        return RemoteDirectory(directory.as_uri())
    return RemoteDirectory(request.getfixturevalue("web").url)


async def test_ranges_are_exact(remote: RemoteDirectory):
    version = await remote.stat("f.bin")
    assert version.size_bytes == len(CONTENT)
    for start, size in ((0, 1), (5, 1000), (len(CONTENT) - 7, 7), (0, len(CONTENT))):
        assert await remote.read_range("f.bin", start, size, version) == CONTENT[start:][:size]


async def test_whole_files_have_a_limit(remote: RemoteDirectory):
    assert await remote.read_file("f.bin", len(CONTENT)) == CONTENT
    assert await remote.read_file("empty", 0) == b""
    with pytest.raises(CorruptCheckpoint, match="at most"):
        await remote.read_file("f.bin", len(CONTENT) - 1)
    with pytest.raises(NotFound):
        await remote.read_file("nothing", 10)


async def test_another_version_is_noticed(remote: RemoteDirectory):
    version = await remote.stat("f.bin")
    for other in (ObjectVersion(version.size_bytes, '"x"'), ObjectVersion(3, version.tag)):
        with pytest.raises(CorruptCheckpoint, match="replaced"):
            await remote.read_range("f.bin", 0, 10, other)


async def test_a_server_that_ignores_if_match_is_noticed(web: WebServer):
    remote = RemoteDirectory(web.url)
    version = await remote.stat("f.bin")
    web.faults.tag, web.faults.obey_if_match = "v2", False
    with pytest.raises(CorruptCheckpoint, match="replaced"):
        await remote.read_range("f.bin", 0, 10, version)


async def test_a_cut_a_stall_and_silence_are_unavailable(web: WebServer):
    remote = RemoteDirectory(web.url, stall_s=0.3)
    version = await remote.stat("f.bin")
    web.faults.cut_after_bytes = 100
    with pytest.raises(Unavailable):
        await remote.read_range("f.bin", 0, 1000, version)
    web.faults.cut_after_bytes = None
    web.faults.stall = threading.Event()
    with pytest.raises(Unavailable):
        await remote.read_range("f.bin", 0, 1000, version)


async def test_a_server_without_ranges_is_refused(web: WebServer):
    remote = RemoteDirectory(web.url)
    version = await remote.stat("f.bin")
    web.faults.ignore_ranges = True
    with pytest.raises(InvalidRequest, match="ranges"):
        await remote.read_range("f.bin", 0, 1000, version)


async def test_nobody_there_is_unavailable(directory: Path):
    with web_server(directory) as server:
        url = server.url
    with pytest.raises(Unavailable):
        await RemoteDirectory(url).stat("f.bin")


@pytest.mark.parametrize("url", ["ftp://host/x", "://", "s3://", "http://u:p@host/x", "memory:///"])
def test_urls_of_no_known_kind_are_refused(url: str):
    with pytest.raises(InvalidRequest):
        RemoteDirectory(url)


def test_a_path_is_no_url():
    assert not is_url("/data/model")
    assert is_url("s3://bucket/model")
