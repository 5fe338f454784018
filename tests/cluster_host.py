"""A whole cluster of real processes for end-to-end and fault tests, started as a user starts it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gearfall.cli.connection import run_dir
from gearfall.cli.demo import prepare
from gearfall.client import AsyncClient
from gearfall.infra.failpoints import DIRECTORY_VARIABLE, RULES_FILE
from gearfall.infra.local.cluster_file import ClusterFile, ServiceFacts, read_cluster_file
from gearfall.infra.local.tether import tethered


class ClusterHost:
    """A running `gearfall up`, which ends with this process at the latest."""

    def __init__(
        self, home: Path, *flags: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it and return when it serves; raise what it printed when it does not."""
        self.home = home
        self._points = (environment or {}).get(DIRECTORY_VARIABLE)
        command = [sys.executable, "-m", "gearfall.cli", "up", "--home", str(home), "--json"]
        addresses = ["--rest", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
        self._process = subprocess.Popen(
            tethered([*command, *addresses, *flags]),
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if line.startswith("}"):
                break
        self.addresses: dict[str, str] = json.loads("".join(lines))

    @property
    def facts(self) -> ClusterFile:
        """What the launcher says about the cluster now."""
        return read_cluster_file(run_dir(self.home))

    def service(self, name: str) -> ServiceFacts:
        """The first process of a service."""
        return next(facts for facts in self.facts.services if facts.service == name)

    def log_lines(self, service: str) -> list[dict[str, Any]]:
        """Everything that a service's processes logged so far."""
        paths = [Path(facts.log) for facts in self.facts.services if facts.service == service]
        lines = [line for path in paths for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def arm(self, *rules: str) -> None:
        """Put these rules in force at the failpoints of all processes, in place of those before."""
        assert self._points is not None, f"started without {DIRECTORY_VARIABLE}"
        new = Path(self._points) / "new"
        new.write_text("\n".join(rules))
        new.replace(new.with_name(RULES_FILE))

    def stop(self) -> int:
        """Stop it as Ctrl-C does and return its exit status."""
        self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(60)
        finally:
            self._process.kill()
            assert self._process.stdout is not None
            self._process.stdout.close()


OUTSIDE_VARIABLES = {"rest": "GEARFALL_TEST_REST", "grpc": "GEARFALL_TEST_GRPC"}
"""Where a cluster that runs already is reached, host:port each; unset: one is started."""


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterHost]:
    """One node, one worker, room for every test model."""
    if OUTSIDE_VARIABLES["grpc"] in os.environ:
        pytest.skip("looks behind the doors of a cluster that this run has not started")
    started = ClusterHost(
        tmp_path_factory.mktemp("cluster"),
        *("--max-replicas", "32"),
        environment={DIRECTORY_VARIABLE: str(tmp_path_factory.mktemp("points"))},
    )
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="session")
def doors(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """The published addresses, `rest` and `grpc`, of the cluster under test."""
    if OUTSIDE_VARIABLES["grpc"] in os.environ:
        return {door: os.environ[variable] for door, variable in OUTSIDE_VARIABLES.items()}
    started: ClusterHost = request.getfixturevalue("host")
    return started.addresses


@pytest.fixture
async def client(doors: Mapping[str, str]) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(doors["grpc"]) as opened:
        yield opened


@pytest.fixture(scope="session")
def rest_url(doors: Mapping[str, str]) -> str:
    return f"http://{doors['rest']}"


@pytest.fixture(scope="session")
def demo_family(doors: Mapping[str, str]) -> None:
    """The three trained models and their cascade, registered once."""
    prepare(doors["grpc"], quiet=True)


def kill(pid: int) -> None:
    """End one process at once, as a machine that dies does."""
    assert pid > 0, "0 would be every process of this group, this one too"
    os.kill(pid, signal.SIGKILL)
