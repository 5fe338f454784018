"""What a local cluster is made of, and the command of each of its services, in order of start."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gearfall.infra.local.own_programs import python_path
from gearfall.infra.local.supervised_process import ProcessSpec
from gearfall.infra.net.bearer import SECRET_VARIABLE

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
        log_path=log_path_of(settings, name),
        environment={"PYTHONPATH": python_path(), **(environment or {})},
    )


def log_path_of(settings: LocalClusterSettings, name: str) -> Path:
    """Return where a process's output goes."""
    return settings.runtime_dir / "logs" / f"{name}.log"
