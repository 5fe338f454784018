"""A cluster that runs in containers: starts it, strikes single containers, heals them."""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gearfall.demo.catalogue import CHECKPOINTS
from gearfall.infra.local.local_servers import free_ports
from tests.compose.docker_engine import MissingError
from tests.compose.images import ROOT, SERVERS_IMAGE, SERVICE_IMAGE

PROJECT_VARIABLE = "GEARFALL_COMPOSE_PROJECT"
PACE = "engine.decode=delay:0.004"
"""Slows every token down, so that an answer is still on its way when a container is struck."""
SLOTS = 4
"""Jobs that one replica runs at once: few, so that a few more have to wait."""
SERVICES = (
    *("etcd", "redis", "router", "scheduler-1", "scheduler-2"),
    *("store-1", "store-2", "worker-1", "worker-2"),
)
_FILES = (ROOT / "deploy/compose/compose.yml", Path(__file__).with_name("compose.test.yml"))
_HEALTHY_WITHIN_S = 120.0
_LOOK_AGAIN_S = 0.1
_COMMAND_TIMEOUT_S = 120.0


class Containers:
    """The containers of one project, by the names of their services. Every call blocks."""

    def __init__(self, project: str, environment: Mapping[str, str] | None = None) -> None:
        """`environment` leads the client to the engine, beside this process's own."""
        self.project = project
        self._environment = {**os.environ, **(environment or {})}

    def kill(self, service: str) -> None:
        """End a container at once; the engine leaves it down until `start`."""
        self.docker("kill", self.find(service))

    def crash(self, service: str) -> None:
        """Kill every process of a service, its init apart; the engine starts it again by itself."""
        argv = ["exec", self.find(service), "sh", "-c", "kill -9 -1"]
        subprocess.run(  # the shell goes down with the container: any exit status will do
            ["docker", *argv],
            env=self._environment,
            capture_output=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )

    def start(self, service: str) -> None:
        """Start a container that is down."""
        self.docker("start", self.find(service))

    def stop(self, service: str) -> int:
        """Stop a container in order, within its own grace; return its exit status."""
        self.docker("stop", "--time", str(self._grace_s(service)), self.find(service))
        return int(self.look(service, "{{.State.ExitCode}}"))

    def restart(self, service: str) -> None:
        """Stop and start a container."""
        self.docker("restart", self.find(service))

    def pause(self, service: str) -> None:
        """Freeze every process of a container; its connections stay open."""
        self.docker("pause", self.find(service))

    def unpause(self, service: str) -> None:
        """Let a frozen container go on."""
        self.docker("unpause", self.find(service))

    def disconnect(self, *services: str) -> None:
        """Pull containers out of the cluster's network, in the order given."""
        for service in services:
            self.docker("network", "disconnect", self._network, self.find(service))

    def connect(self, *services: str) -> None:
        """Put containers back into the cluster's network under their names."""
        for service in services:
            alias = ("--alias", service)
            self.docker("network", "connect", *alias, self._network, self.find(service))

    def find(self, service: str) -> str:
        """Return a service's container, running or not."""
        labels = {"project": self.project, "service": service}
        filters = [f"--filter=label=com.docker.compose.{k}={v}" for k, v in labels.items()]
        return self.docker("ps", "--all", "--quiet", *filters).strip()

    def look(self, service: str, template: str) -> str:
        """Return what `docker inspect` says of a container, by a template of its own."""
        return self.docker("inspect", "--format", template, self.find(service)).strip()

    def restarts(self, service: str) -> int:
        """How often the engine has started it again."""
        return int(self.look(service, "{{.RestartCount}}"))

    def log_lines(self, service: str) -> Sequence[Mapping[str, object]]:
        """Everything that a service said as JSON, its ready line included."""
        ran = self._run("logs", self.find(service))
        lines = (ran.stdout + ran.stderr).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_healthy(self, *services: str) -> None:
        """Return when these are up and well; raises TimeoutError naming those that are not."""
        deadline_s = time.monotonic() + _HEALTHY_WITHIN_S
        state = "{{.State.Status}} {{.State.Health.Status}}"
        while ill := [name for name in services if self.look(name, state) != "running healthy"]:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not healthy: {', '.join(ill)}")
            time.sleep(_LOOK_AGAIN_S)

    def docker(self, *arguments: str) -> str:
        """Run a docker command and return what it prints. Raises RuntimeError when it fails."""
        return self._run(*arguments).stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            ["docker", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
        if ran.returncode != 0:
            raise RuntimeError(f"docker {' '.join(arguments)}: {ran.stderr.strip()}")
        return ran

    def _grace_s(self, service: str) -> int:
        return int(self.look(service, "{{.Config.StopTimeout}}"))

    @property
    def _network(self) -> str:
        return f"{self.project}_cluster"


class ComposeCluster:
    """The whole cluster, from up to down."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment` leads to the engine that has the images."""
        self.project = f"gearfall-test-{os.getpid()}"
        rest, grpc = free_ports(2)
        self.doors = {"rest": f"127.0.0.1:{rest}", "grpc": f"127.0.0.1:{grpc}"}
        self.containers = Containers(self.project, environment)
        self._compose = compose_command()
        # What an operator has set for a cluster of theirs is not for this one.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("GEARFALL_")}
        self._environment = {
            **inherited,
            **environment,
            "GEARFALL_IMAGE": SERVICE_IMAGE,
            "GEARFALL_ETCD_IMAGE": SERVERS_IMAGE,
            "GEARFALL_REDIS_IMAGE": SERVERS_IMAGE,
            "GEARFALL_REST_PORT": str(rest),
            "GEARFALL_GRPC_PORT": str(grpc),
            "GEARFALL_CLUSTER_SECRET": "only known to this cluster",
            "GEARFALL_DRAM_BYTES": str(512 << 20),
            "GEARFALL_SPARE_BYTES": str(64 << 20),
            "GEARFALL_STORE_MEMORY": "2g",
            "GEARFALL_WORKER_MEMORY": "3g",
            "GEARFALL_MAX_REPLICAS": "32",
            "GEARFALL_SLOTS": str(SLOTS),
            "GEARFALL_THREADS": "1",
            "GEARFALL_TEST_DEMO": str(CHECKPOINTS),
            "GEARFALL_TEST_FAILPOINTS": PACE,
        }

    def up(self, models: Path) -> None:
        """Start everything, `models` readable at /models, and return when all of it is well."""
        self._environment["GEARFALL_MODELS_DIR"] = str(models)
        self._run("up", "--detach", "--no-build")
        self.containers.wait_healthy(*SERVICES)

    def down(self) -> None:
        """Stop everything and remove its containers, volumes and network."""
        self._run("down", "--volumes", "--timeout", "2")

    def print_logs(self) -> None:
        """Show the end of what every container said."""
        self._run("logs", "--tail", "40", "--no-color")

    def _run(self, *arguments: str) -> None:
        files = [f"--file={path}" for path in _FILES]
        argv = [*self._compose, f"--project-name={self.project}", *files, *arguments]
        subprocess.run(argv, env=self._environment, check=True)


def compose_command() -> Sequence[str]:
    """Return how Compose is called here; MissingError when it is not there."""
    for argv in (["docker", "compose"], ["docker-compose"]):
        try:
            found = subprocess.run([*argv, "version"], capture_output=True, check=False)
        except FileNotFoundError:
            continue
        if found.returncode == 0:
            return argv
    raise MissingError("Docker Compose (neither `docker compose` nor `docker-compose` works)")
