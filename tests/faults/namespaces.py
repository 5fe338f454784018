"""Private networks for a cluster: a hub and members behind it, each a network namespace of its own.

Nothing here is reachable from outside: no interface of the machine is touched.

    member 1 (10.77.1.2) ---\
    member 2 (10.77.2.2) ----- hub (10.77.0.1), which forwards between them
    member 3 (10.77.3.2) ---/
"""

import os
import shutil
import subprocess
from collections.abc import Sequence

HUB = "10.77.0.1"


def why_not() -> str:
    """Return why there can be no namespaces here; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` on PATH"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return f"no network namespace can be made: {probe.stderr!r}" if probe.returncode else ""


class Namespaces:
    """Owner of the hub and of its members, by number from 1 on."""

    def __init__(self, members: int) -> None:
        self._prefix = f"gearfall-{os.getpid()}"
        self.members = range(1, members + 1)
        self.close()
        self._make(self.hub)
        self._hub("addr", "add", f"{HUB}/32", "dev", "lo")
        run(["ip", "netns", "exec", self.hub, "sysctl", "-qw", "net.ipv4.ip_forward=1"])
        for number in self.members:
            self._add(number)

    @property
    def hub(self) -> str:
        """Name of the hub's namespace."""
        return f"{self._prefix}-hub"

    def member(self, number: int) -> str:
        """Name of a member's namespace."""
        return f"{self._prefix}-{number}"

    def inside(self, name: str, argv: Sequence[str]) -> Sequence[str]:
        """Return the command that runs another one in a namespace."""
        return ["ip", "netns", "exec", name, *argv]

    def cut(self, one: int, other: int) -> None:
        """Drop what two members send to each other, in silence."""
        for source, target in ((one, other), (other, one)):
            self._hub("rule", "add", "from", address(source), "to", address(target), "blackhole")

    def mend(self, one: int, other: int) -> None:
        """Let two members hear each other again."""
        for source, target in ((one, other), (other, one)):
            self._hub("rule", "del", "from", address(source), "to", address(target), "blackhole")

    def isolate(self, number: int) -> None:
        """Pull a member's plug."""
        run(["ip", "-n", self.member(number), "link", "set", "wire", "down"])

    def rejoin(self, number: int) -> None:
        """Put a member's plug back."""
        run(["ip", "-n", self.member(number), "link", "set", "wire", "up"])
        self._route(number)

    def close(self) -> None:
        """Remove all of it. Idempotent."""
        known = run(["ip", "netns", "list"]).split()
        for name in (self.hub, *map(self.member, self.members)):
            if name in known:
                run(["ip", "netns", "del", name])

    def _add(self, number: int) -> None:
        name, port = self.member(number), f"port{number}"
        self._make(name)
        pair = ["type", "veth", "peer", "name", "wire", "netns", name]
        self._hub("link", "add", port, *pair)
        self._hub("addr", "add", f"10.77.{number}.1/30", "dev", port)
        self._hub("link", "set", port, "up")
        run(["ip", "-n", name, "addr", "add", f"{address(number)}/30", "dev", "wire"])
        run(["ip", "-n", name, "link", "set", "wire", "up"])
        self._route(number)

    def _route(self, number: int) -> None:
        gateway = f"10.77.{number}.1"
        run(["ip", "-n", self.member(number), "route", "add", "default", "via", gateway])

    def _make(self, name: str) -> None:
        run(["ip", "netns", "add", name])
        run(["ip", "-n", name, "link", "set", "lo", "up"])

    def _hub(self, *words: str) -> None:
        run(["ip", "-n", self.hub, *words])


def address(number: int) -> str:
    """Return a member's address."""
    return f"10.77.{number}.2"


def run(argv: Sequence[str]) -> str:
    """Run a command and return its output; an AssertionError says what it complained about."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout
