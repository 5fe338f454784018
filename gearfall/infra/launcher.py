"""A whole cluster on one machine: etcd, Redis and every service as supervised child processes."""

import asyncio
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import gearfall
from gearfall.core.errors import InvalidRequest
from gearfall.infra.bearer import SECRET_VARIABLE
from gearfall.infra.cluster_file import (
    ClusterFile,
    ServiceFacts,
    lock_runtime_dir,
    read_cluster_file,
    remove_cluster_file,
    write_cluster_file,
)
from gearfall.infra.local_servers import ServerSpec, etcd_spec, free_ports, redis_spec
from gearfall.infra.supervised_process import ProcessSpec, ProcessState, SupervisedProcess

_METRICS = ("--metrics", "127.0.0.1:0")


@dataclass(frozen=True, slots=True)
class LocalClusterSettings:
    """What a local cluster is made of."""

    runtime_dir: Path
    """Logs, lock and cluster.json; private."""
    data_dir: Path
    """What outlives a restart: etcd, Redis and the stores' SSD tiers."""
    rest_listen: str = "127.0.0.1:8080"
    grpc_listen: str = "127.0.0.1:50051"
    etcd_url: str = ""
    """Empty: start one here."""
    redis_url: str = ""
    """Empty: start one here."""
    nodes: int = 1
    """Each has one store and `workers_per_node` workers."""
    workers_per_node: int = 1
    dram_bytes: int = 4 * 2**30
    """DRAM pool of each store."""
    memory_bytes: int = 4 * 2**30
    """For all replicas of one worker."""
    max_replicas: int = 8
    """Models that one worker hosts at once."""
    slots: int = 16
    """Jobs that one replica runs at once."""
    threads: int = 1
    """Compute threads of one engine."""
    device: str = "cpu"
    keep_alive_s: float = 300.0
    """Idle time after which a model without a deployment is stopped."""
    schedulers: int = 1
    """One leads, the others take over when it dies."""
    policy: str = "ours"
    """How models are placed; the others are there to be compared with."""
    api_keys: tuple[str, ...] = ()
    """Bearer tokens that the router accepts; none: it is open."""
    cluster_secret: str = field(default="", repr=False)
    """What workers send to routers. Empty: $GEARFALL_CLUSTER_SECRET, else a new one for a cluster
    with an etcd of its own; one whose etcd others may share must have it set everywhere, or none.
    """
    log_level: str = "INFO"


CommandTable = Callable[[LocalClusterSettings], Sequence[Sequence[ProcessSpec]]]
"""The stages of a cluster in order of start; settings hold the URLs and fixed addresses by then."""


def service_commands(settings: LocalClusterSettings) -> Sequence[Sequence[ProcessSpec]]:
    """Return the real services: stores, then workers, then the scheduler, then the router."""
    nodes = [f"node-{number}" for number in range(1, settings.nodes + 1)]
    stores = [
        _service(
            settings,
            "store",
            f"store-{node}",
            *("--node-id", node, "--data-dir", settings.data_dir / node),
            *("--dram-bytes", settings.dram_bytes),
            *_METRICS,
        )
        for node in nodes
    ]
    workers = [
        _service(
            settings,
            "worker",
            f"worker-{node}-{number}",
            *("--node-id", node, "--device", settings.device),
            *("--memory-bytes", settings.memory_bytes, "--max-replicas", settings.max_replicas),
            *("--slots", settings.slots, "--threads", settings.threads),
            *_METRICS,
            environment={SECRET_VARIABLE: settings.cluster_secret},
        )
        for node in nodes
        for number in range(1, settings.workers_per_node + 1)
    ]
    schedulers = [
        _service(
            settings,
            "scheduler",
            name,
            *("--keep-alive", settings.keep_alive_s, "--policy", settings.policy),
            *_METRICS,
        )
        for name in _scheduler_names(settings.schedulers)
    ]
    router = _service(
        settings,
        "router",
        "router",
        *("--listen", settings.grpc_listen, "--rest", settings.rest_listen),
        # Not as flags, which every user of the machine can read.
        environment={
            "GEARFALL_API_KEY": ",".join(settings.api_keys),
            SECRET_VARIABLE: settings.cluster_secret,
        },
    )
    return (stores, workers, schedulers, (router,))


class LocalCluster:
    """Owner of all processes of one local cluster. Start and stop it in the main thread's loop.

    The processes end with this one, however it ends (Linux).
    """

    def __init__(
        self, settings: LocalClusterSettings, *, commands: CommandTable = service_commands
    ) -> None:
        """`commands` says which services to start once etcd and Redis are there."""
        if settings.nodes < 1 or settings.workers_per_node < 1:
            raise InvalidRequest("a cluster needs at least one node and one worker on each")
        if settings.schedulers < 1:
            raise InvalidRequest("a cluster needs at least one scheduler")
        if any("," in key or not key for key in settings.api_keys):
            raise InvalidRequest("an API key must be some text without a comma", param="api_keys")
        self.settings = settings
        self._commands = commands
        self._stages: list[list[SupervisedProcess]] = []
        self._lock: IO[bytes] | None = None

    @property
    def rest_address(self) -> str:
        """host:port of the REST door."""
        return self.settings.rest_listen

    @property
    def grpc_address(self) -> str:
        """host:port of the gRPC door."""
        return self.settings.grpc_listen

    @property
    def processes(self) -> Sequence[SupervisedProcess]:
        """All processes, in order of start."""
        return [process for stage in self._stages for process in stage]

    async def start(self) -> None:
        """Start everything; return when all of it serves.

        Raises Conflict when a cluster runs in this runtime directory, NotFound when a server binary
        is missing, Unavailable when a process does not come up; nothing is left running then.
        """
        self._prepare_directories()
        try:
            await self._start_stage(self._servers())
            for stage in self._commands(self.settings):
                await self._start_stage(stage)
            self._publish()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop everything in reverse order of start. Idempotent."""
        while self._stages:
            await asyncio.gather(*(process.stop() for process in self._stages[-1]))
            self._stages.pop()
        if self._lock is not None:
            remove_cluster_file(self.settings.runtime_dir)
            self._lock.close()
            self._lock = None

    def describe(self) -> ClusterFile:
        """Return the cluster as it is now."""
        return ClusterFile(
            launcher_pid=os.getpid(),
            rest_address=self.rest_address,
            grpc_address=self.grpc_address,
            etcd_url=self.settings.etcd_url,
            redis_url=self.settings.redis_url,
            services=tuple(_facts(process) for process in self.processes),
        )

    def _prepare_directories(self) -> None:
        settings = self.settings
        for directory in (settings.runtime_dir, settings.runtime_dir / "logs", settings.data_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = lock_runtime_dir(settings.runtime_dir)
        # Fixed now, so that a router that is started again is found where it was.
        self.settings = replace(
            settings,
            runtime_dir=settings.runtime_dir.absolute(),
            data_dir=settings.data_dir.absolute(),
            rest_listen=_with_port(settings.rest_listen),
            grpc_listen=_with_port(settings.grpc_listen),
            cluster_secret=settings.cluster_secret or _secret_for(settings.etcd_url),
        )

    def _servers(self) -> Sequence[ProcessSpec]:
        """Return the servers to start here, and note their URLs in the settings."""
        specs: list[ServerSpec] = []
        if not self.settings.etcd_url:
            specs.append(etcd := etcd_spec(self.settings.data_dir / "etcd"))
            self.settings = replace(self.settings, etcd_url=etcd.url)
        if not self.settings.redis_url:
            specs.append(redis := redis_spec(self.settings.data_dir / "redis"))
            self.settings = replace(self.settings, redis_url=redis.url)
        return [
            ProcessSpec(
                name=spec.name,
                service=spec.name,
                argv=spec.argv,
                log_path=_log_path(self.settings, spec.name),
                is_ready=spec.is_ready,
            )
            for spec in specs
        ]

    async def _start_stage(self, specs: Sequence[ProcessSpec]) -> None:
        stage = [SupervisedProcess(spec, self._publish) for spec in specs]
        self._stages.append(stage)
        results = await asyncio.gather(
            *(process.start() for process in stage), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _publish(self) -> None:
        write_cluster_file(self.settings.runtime_dir, self.describe())


def _scheduler_names(schedulers: int) -> Sequence[str]:
    if schedulers == 1:
        return ("scheduler",)
    return [f"scheduler-{number}" for number in range(1, schedulers + 1)]


def _service(
    settings: LocalClusterSettings,
    service: str,
    name: str,
    *flags: object,
    environment: Mapping[str, str] | None = None,
) -> ProcessSpec:
    flags = (
        *("--etcd", settings.etcd_url, "--redis", settings.redis_url),
        *("--log-level", settings.log_level),
        *flags,
    )
    return ProcessSpec(
        name=name,
        service=service,
        argv=(sys.executable, "-m", f"services.{service}", *map(str, flags)),
        log_path=_log_path(settings, name),
        environment={"PYTHONPATH": _python_path(), **(environment or {})},
    )


def _python_path() -> str:
    """Return a search path on which `services` lies beside the `gearfall` that runs here."""
    root = str(Path(gearfall.__file__).parent.parent)
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(part for part in (root, inherited) if part)


def _log_path(settings: LocalClusterSettings, name: str) -> Path:
    return settings.runtime_dir / "logs" / f"{name}.log"


def _facts(process: SupervisedProcess) -> ServiceFacts:
    is_ready = process.state is ProcessState.READY
    return ServiceFacts(
        name=process.spec.name,
        service=process.spec.service,
        state=process.state.value,
        pid=process.pid,
        address=str(process.ready_line.get("address", "")) if is_ready else "",
        log=str(process.spec.log_path),
        restarts=process.restarts,
        metrics=_metrics_address(process) if is_ready else "",
    )


def _metrics_address(process: SupervisedProcess) -> str:
    # The router serves its metrics beside its REST API.
    key = "rest" if process.spec.service == "router" else "metrics"
    return str(process.ready_line.get(key, ""))


def _secret_for(etcd_url: str) -> str:
    given = os.environ.get(SECRET_VARIABLE, "")
    return given or ("" if etcd_url else secrets.token_urlsafe(32))


def _with_port(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{free_ports(1)[0]}" if port == "0" else address


__all__ = [
    "ClusterFile",
    "CommandTable",
    "LocalCluster",
    "LocalClusterSettings",
    "ServiceFacts",
    "read_cluster_file",
    "service_commands",
]
