"""`cluster.json`: how commands find the cluster that a launcher runs in a runtime directory.

Beside it lies `prometheus.json`: the same services as targets, for a file_sd_configs of Prometheus.
"""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from gearfall.core.errors import Conflict

_CLUSTER_FILE = "cluster.json"
_TARGETS_FILE = "prometheus.json"
_LOCK_FILE = "lock"


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """One process of a running cluster."""

    name: str
    service: str
    state: str
    pid: int
    address: str
    log: str
    restarts: int
    metrics: str = ""
    """host:port at which Prometheus finds it under /metrics; empty for none."""


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """What `cluster.json` says about a running cluster."""

    launcher_pid: int
    rest_address: str
    grpc_address: str
    etcd_url: str
    redis_url: str
    services: tuple[ServiceFacts, ...]


def write_cluster_file(runtime_dir: Path, cluster: ClusterFile) -> None:
    """Write both files, each whole, or leave the old one."""
    _write(runtime_dir / _CLUSTER_FILE, cluster)
    _write(runtime_dir / _TARGETS_FILE, prometheus_targets(cluster))


def prometheus_targets(cluster: ClusterFile) -> list[dict[str, object]]:
    """Return the services that can be scraped, as Prometheus reads targets from a file."""
    return [
        {
            "targets": [each.metrics],
            "labels": {"job": f"gearfall-{each.service}", "process": each.name},
        }
        for each in cluster.services
        if each.metrics
    ]


def _write(path: Path, value: object) -> None:
    temporary = path.with_suffix(".new")
    with open(temporary, "wb", opener=_open_private) as file:
        file.write(msgspec.json.format(msgspec.json.encode(value)) + b"\n")
    temporary.replace(path)


def read_cluster_file(runtime_dir: Path) -> ClusterFile:
    """Return what the cluster that runs in `runtime_dir` says about itself.

    Raises FileNotFoundError when none runs there: what a killed launcher left behind is ignored.
    """
    value = (runtime_dir / _CLUSTER_FILE).read_bytes()
    if not _is_locked(runtime_dir):
        raise FileNotFoundError(f"no cluster runs in {runtime_dir}")
    return msgspec.json.decode(value, type=ClusterFile)


def remove_cluster_file(runtime_dir: Path) -> None:
    """Remove both files. Idempotent."""
    for name in (_CLUSTER_FILE, _TARGETS_FILE):
        (runtime_dir / name).unlink(missing_ok=True)


def lock_runtime_dir(runtime_dir: Path) -> IO[bytes]:
    """Hold the directory until the returned file is closed; Conflict if another launcher does."""
    file = open(runtime_dir / _LOCK_FILE, "ab", opener=_open_private)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Conflict(f"a cluster runs in {runtime_dir} already") from None
    return file


def _is_locked(runtime_dir: Path) -> bool:
    try:
        lock_runtime_dir(runtime_dir).close()
    except Conflict:
        return True
    return False


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
