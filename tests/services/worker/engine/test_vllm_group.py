"""A process group that ends with its leader: real processes."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.worker.engine import vllm_group

LEADER = """
import subprocess, sys
from pathlib import Path
from services.worker.engine.vllm_group import lead_group
member = lead_group(Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, member, flush=True)
input()
"""
"""Says who is in its group, and ends when it is told a line."""


def wait_for_ends(pids: Sequence[int], descriptors: Sequence[int]) -> None:
    for pid, descriptor in zip(pids, descriptors, strict=True):
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        assert poller.poll(20_000), f"{pid} lives on"
        os.close(descriptor)


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "by itself"])
def test_a_group_and_its_directory_end_with_the_leader(tmp_path: Path, is_killed: bool) -> None:
    directory = tmp_path / "weights"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"many")
    command = (sys.executable, "-c", LEADER, str(directory))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as leader:
        assert leader.stdin is not None
        assert leader.stdout is not None
        pids = [int(pid) for pid in leader.stdout.readline().split()]
        members = [os.pidfd_open(pid) for pid in pids]
        assert {os.getpgid(pid) for pid in pids} == {leader.pid}
        if is_killed:
            leader.kill()
        else:
            leader.stdin.write("\n")
            leader.stdin.flush()
        assert leader.wait(20) == (-signal.SIGKILL if is_killed else 0)
        wait_for_ends(pids, members)
    assert not directory.exists()


def test_who_is_not_in_the_group_ends_nobody(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        command = (sys.executable, vllm_group.__file__, str(other.pid), "0", str(tmp_path))
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        assert "is not in the group" in done.stderr
        assert other.poll() is None
        other.kill()
    assert tmp_path.exists()
