"""How a command finds the cluster, and the options that all commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from gearfall.client import Client
from gearfall.core.errors import InvalidRequest, Unavailable
from gearfall.infra.local.launcher import read_cluster_file

Server = Annotated[
    str,
    typer.Option(
        help="host:port of a router's gRPC server; default: the cluster started by `gearfall up`.",
        envvar="GEARFALL_SERVER",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Home = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the local cluster's state, logs and checkpoints.",
        envvar="GEARFALL_HOME",
        show_default="~/.gearfall",
    ),
]


def default_home() -> Path:
    """Directory of the local cluster: $GEARFALL_HOME, else ~/.gearfall."""
    return Path(os.environ.get("GEARFALL_HOME") or Path.home() / ".gearfall").absolute()


def run_dir(home: Path) -> Path:
    """Directory of sockets, logs and `cluster.json` of the cluster at `home`."""
    return home / "run"


def connect(server: str) -> Client:
    """Return a client for `server`, or for the local cluster; raise Unavailable without one."""
    return Client(server or _local_address(), api_key=api_key())


def api_key() -> str:
    """The key that commands send: $GEARFALL_API_KEY, of several the first."""
    return os.environ.get("GEARFALL_API_KEY", "").partition(",")[0]


def _local_address() -> str:
    path = run_dir(default_home())
    try:
        return read_cluster_file(path).grpc_address
    except FileNotFoundError:
        raise Unavailable(
            f"no running cluster in {path}: start one with `gearfall up`, or name one with --server"
        ) from None


def parse_address(text: str, *, param: str) -> str:
    """Return `text` if it is host:port with a port of 0 to 65535, else raise InvalidRequest."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"{param} must be HOST:PORT, not {text!r}", param=param)
    return text
