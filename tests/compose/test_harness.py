"""What the compose tests' own harness works out: rules to undo, this machine's pip settings."""

import subprocess
from pathlib import Path

import pytest

from tests.compose import run
from tests.compose.compose_cluster import compose_command
from tests.compose.docker_engine import (
    ForeignEngine,
    MissingError,
    OwnEngine,
    find_engine,
    require_room,
    undo_commands,
)
from tests.compose.images import PipSettings, read_pip_settings


def test_what_came_to_be_in_force_is_undone_in_an_order_that_works() -> None:
    before = [("filter", ":FORWARD ACCEPT"), ("filter", ":INPUT ACCEPT")]
    new = [
        ("filter", ":FORWARD DROP"),
        ("filter", ":DOCKER -"),
        ("filter", "-A FORWARD -o docker0 -j DOCKER"),
        ("filter", '-A DOCKER -m comment --comment "two words" -j RETURN'),
        ("nat", ":PREROUTING ACCEPT"),
    ]
    assert undo_commands(new, before) == [
        ["-t", "filter", "-D", "FORWARD", "-o", "docker0", "-j", "DOCKER"],
        [
            *("-t", "filter", "-D", "DOCKER", "-m", "comment"),
            *("--comment", "two words", "-j", "RETURN"),
        ],
        ["-t", "filter", "-F", "DOCKER"],
        ["-t", "filter", "-X", "DOCKER"],
        ["-t", "filter", "-P", "FORWARD", "ACCEPT"],
    ]


def test_pip_settings_are_read_from_its_own_listing() -> None:
    listing = (
        ":env:.cert='/etc/ca.pem'\n:env:.find-links='/wheels'\nglobal.find-links='/wheels /more'\n"
        "global.extra-index-url='file:///local/simple https://packages.example/simple'\n"
    )
    found = read_pip_settings(listing)
    assert found == PipSettings(
        certificates=Path("/etc/ca.pem"),
        folders=(Path("/wheels"), Path("/more")),
        variables={"PIP_EXTRA_INDEX_URL": "https://packages.example/simple"},
    )
    assert not found.is_plain
    assert read_pip_settings("").is_plain


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    return tmp_path


def _put(path: Path, name: str, script: str) -> None:
    (path / name).write_text(f"#!/bin/sh\n{script}\n")
    (path / name).chmod(0o755)


def test_without_docker_it_is_said_what_is_missing(bare_path: Path) -> None:
    with pytest.raises(MissingError, match="no `docker` on PATH"):
        find_engine(bare_path / "engine")
    _put(bare_path, "docker", "exit 1")
    with pytest.raises(MissingError, match="no dockerd, iptables, ip to start one"):
        find_engine(bare_path / "engine")


def test_an_engine_that_answers_is_used_and_left_alone(bare_path: Path) -> None:
    _put(bare_path, "docker", "exit 0")
    engine = find_engine(bare_path / "engine")
    assert engine.environment == {}
    engine.stop()
    assert not (bare_path / "engine").exists()


def test_an_own_engine_that_does_not_come_up_says_why(bare_path: Path) -> None:
    _put(bare_path, "docker", "exit 1")
    _put(bare_path, "dockerd", "echo no such storage driver >&2; exit 1")
    forwarding = bare_path / "ip_forward"
    forwarding.write_text("0")
    with pytest.raises(MissingError, match="no such storage driver"):
        OwnEngine(bare_path / "engine", forwarding=forwarding)
    assert forwarding.read_text() == "0"


def test_a_run_without_docker_has_a_status_of_its_own(
    bare_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([]) == run.EXIT_SKIPPED == 77
    assert capsys.readouterr().out.startswith("SKIPPED: ")


@pytest.mark.parametrize(
    ("images", "needed_bytes"),
    [("exit 1", run.NEEDED_BYTES), ("exit 0", run.CLUSTER_BYTES)],
    ids=["images to build", "images there"],
)
def test_a_run_without_room_says_what_it_needs_and_what_there_is(
    bare_path: Path, capsys: pytest.CaptureFixture[str], images: str, needed_bytes: int
) -> None:
    # /proc: where nothing is ever free
    _put(bare_path, "docker", f'if [ "$1" = image ]; then {images}; fi; echo /proc')
    assert run.main([]) == run.EXIT_SKIPPED
    said = capsys.readouterr().out
    assert said.startswith("SKIPPED: ")
    assert f"needs {needed_bytes / 1e9:.1f} GB, 0.0 GB are free" in said


def test_an_engine_with_room_is_let_through(bare_path: Path) -> None:
    _put(bare_path, "docker", f"echo {bare_path}")
    require_room(ForeignEngine(), 1)
    _put(bare_path, "docker", "echo /on/another/machine")
    require_room(ForeignEngine(), 10**30)


def test_the_harness_finds_compose_where_it_is_a_command_of_its_own(bare_path: Path) -> None:
    _put(bare_path, "docker", "exit 1")
    with pytest.raises(MissingError, match="Docker Compose"):
        compose_command()
    _put(bare_path, "docker-compose", "exit 0")
    assert compose_command() == ["docker-compose"]
    assert subprocess.run(compose_command(), check=False).returncode == 0
