"""A Docker engine to test with: the one that answers, else one of this process's own.

An own engine lives in private directories and takes everything with it when it stops: containers'
processes, its bridges, its packet filter rules, the forwarding switch.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_ADDRESSES = (
    *("--bip", "10.213.0.1/24"),
    *("--default-address-pool", "base=10.214.0.0/16,size=24"),
)
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_FILTERS = ("iptables", "ip6tables")
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
_ASK_TIMEOUT_S = 10.0


class MissingError(Exception):
    """What a machine lacks, in words; the tests are skipped for it."""


class ForeignEngine:
    """An engine that was there: used as the client finds it, and left alone."""

    environment: Mapping[str, str] = {}

    def stop(self) -> None:
        """Leave it as it is."""


class OwnEngine:
    """A dockerd that this process started; `environment` leads clients to it."""

    def __init__(self, directory: Path, *, forwarding: Path = _FORWARDING) -> None:
        """Start it with its data in `directory` and return when it answers.

        `forwarding` is the machine's switch for forwarded packets, which dockerd turns on.

        Raises MissingError with the end of its log when it does not come up.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._rules = {tool: _rules(tool) for tool in _FILTERS}
        self._forwarding = forwarding
        self._forwards = forwarding.read_text()
        self._links = _links()
        self._log = directory / "dockerd.log"
        url = f"unix://{directory}/docker.sock"
        self.environment = {"DOCKER_HOST": url}
        argv = [
            *("dockerd", "--host", url, "--pidfile", str(directory / "docker.pid")),
            *("--data-root", str(directory / "data"), "--exec-root", str(directory / "exec")),
            *_ADDRESSES,
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait_answers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it and undo what it did to the machine's network."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for tool, rules in self._rules.items():
            _undo_rules(tool, rules)
        # It leaves its bridges: the default one, and one for each network that was not removed.
        for link in _links() - self._links:
            if link == "docker0" or link.startswith("br-"):
                subprocess.run(["ip", "link", "delete", link], check=True)
        self._forwarding.write_text(self._forwards)

    def _wait_answers(self) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not _answers(self.environment):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                tail = self._log.read_text(errors="replace")[-800:]
                raise MissingError(f"a Docker engine that starts here; dockerd said: {tail}")
            time.sleep(0.1)


def find_engine(directory: Path) -> ForeignEngine | OwnEngine:
    """Return the engine that answers, else start one; MissingError says what is missing for it."""
    if shutil.which("docker") is None:
        raise MissingError("a Docker client (no `docker` on PATH)")
    if _answers({}):
        return ForeignEngine()
    if os.environ.get("DOCKER_HOST"):
        raise MissingError("a Docker engine (none answers at DOCKER_HOST)")
    lacks = [tool for tool in ("dockerd", "iptables", "ip") if shutil.which(tool) is None]
    if lacks:
        raise MissingError(f"a Docker engine (none answers; no {', '.join(lacks)} to start one)")
    if os.geteuid() != 0:
        raise MissingError("a Docker engine (none answers, and only root can start one)")
    return OwnEngine(directory)


def require_room(engine: ForeignEngine | OwnEngine, needed_bytes: int) -> None:
    """Raise MissingError unless so much is free where the engine keeps its data."""
    told = _ask(engine.environment, "info", "--format", "{{.DockerRootDir}}")
    directory = Path(told.strip() if told else "/")
    if not directory.exists():
        return  # on another machine
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise MissingError(
            f"room on the disk of {directory}: it needs {needed_bytes / 1e9:.1f} GB, "
            f"{free_bytes / 1e9:.1f} GB are free"
        )


def _answers(environment: Mapping[str, str]) -> bool:
    return _ask(environment, "version", "--format", "{{.Server.Version}}") is not None


def _ask(environment: Mapping[str, str], *arguments: str) -> str | None:
    """Return what the client says, or None where it fails or is kept waiting."""
    try:
        asked = subprocess.run(
            ["docker", *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=_ASK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return asked.stdout if asked.returncode == 0 else None


def _links() -> frozenset[str]:
    return frozenset(path.name for path in Path("/sys/class/net").iterdir())


def _rules(tool: str) -> Sequence[tuple[str, str]]:
    """Return (table, line) of everything in force, in `iptables-save`'s words."""
    if shutil.which(f"{tool}-save") is None:
        return ()
    saved = subprocess.run([f"{tool}-save"], capture_output=True, text=True, check=False).stdout
    found, table = [], ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            found.append((table, line.partition(" [")[0]))  # without the packet counters
        elif line.startswith("-A"):
            found.append((table, line))
    return found


def _undo_rules(tool: str, before: Sequence[tuple[str, str]]) -> None:
    """Remove what came to be in force since `before`, and put changed policies back."""
    new = [entry for entry in _rules(tool) if entry not in before]
    for command in undo_commands(new, before):
        subprocess.run([tool, *command], check=False, stderr=subprocess.DEVNULL)


def undo_commands(
    new: Sequence[tuple[str, str]], before: Sequence[tuple[str, str]]
) -> Sequence[Sequence[str]]:
    """Return the commands that take `new` away again: rules, then chains; policies as `before`."""
    rules = [["-t", table, "-D", *shlex.split(line)[1:]] for table, line in new if line[:2] == "-A"]
    chains = [(table, *line[1:].split()) for table, line in new if line[0] == ":"]
    own = [(table, chain) for table, chain, policy in chains if policy == "-"]
    flushes = [["-t", table, "-F", chain] for table, chain in own]
    removals = [["-t", table, "-X", chain] for table, chain in own]
    old = {
        (table, chain): policy
        for table, line in before
        if line[0] == ":"
        for chain, policy in [line[1:].split()]
    }
    policies = [
        # A table that nobody had used accepts everything.
        ["-t", table, "-P", chain, old.get((table, chain), "ACCEPT")]
        for table, chain, policy in chains
        if policy != "-" and policy != old.get((table, chain), "ACCEPT")
    ]
    return [*rules, *flushes, *removals, *policies]
