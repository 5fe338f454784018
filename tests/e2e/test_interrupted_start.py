"""`gearfall up` told to end in the middle of its start: it ends then, and leaves nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gearfall.cli.connection import run_dir
from gearfall.infra.local.tether import tethered

_LATEST_S = 60.0
_LOOK_AGAIN_S = 0.01


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_start_that_is_interrupted_ends_at_once(tmp_path: Path, signum: signal.Signals) -> None:
    home = tmp_path / "home"
    argv = [sys.executable, "-m", "gearfall.cli", "up", "--home", str(home)]
    doors = ["--rest", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    logs = run_dir(home) / "logs"
    with subprocess.Popen(tethered([*argv, *doors]), stdout=subprocess.PIPE) as launcher:
        deadline_s = time.monotonic() + _LATEST_S
        while not (logs / "store-node-1.log").exists():
            assert time.monotonic() < deadline_s
            time.sleep(_LOOK_AGAIN_S)
        launcher.send_signal(signum)
        printed, _ = launcher.communicate(timeout=_LATEST_S)
    assert (launcher.returncode, printed) == (0, b"")
    assert not (logs / "router.log").exists(), "it went on with its start"
    assert not (run_dir(home) / "cluster.json").exists()
    assert processes_of(home) == []


def processes_of(home: Path) -> list[str]:
    """Return the command lines of live processes that name a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(home) in command:
            found.append(command)
    return found
