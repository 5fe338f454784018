"""A whole cluster on one machine: etcd, Redis and every service as supervised child processes."""

import asyncio
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import IO

from gearfall.core.errors import InvalidRequest
from gearfall.infra.local.cluster_file import (
    ClusterFile,
    ServiceFacts,
    lock_runtime_dir,
    read_cluster_file,
    remove_cluster_file,
    write_cluster_file,
)
from gearfall.infra.local.local_servers import ServerSpec, etcd_spec, free_ports, redis_spec
from gearfall.infra.local.local_services import (
    CommandTable,
    LocalClusterSettings,
    log_path_of,
    service_commands,
)
from gearfall.infra.local.supervised_process import ProcessSpec, ProcessState, SupervisedProcess
from gearfall.infra.net.bearer import SECRET_VARIABLE


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
                log_path=log_path_of(self.settings, spec.name),
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
