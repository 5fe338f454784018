"""Ends what vLLM started, and its directory, with the engine process, however that one ends.

vLLM computes in children of the process that asks it, and these outlive a parent that is killed,
with all of the device's memory (vllm-project/vllm#55510). A worker ends its engines by SIGKILL. So
the engine leads a process group, and one small member of it waits for the leader's end, removes
the directory and kills the group. It can't hit others: as its member it keeps the group's id taken.

`python vllm_group.py LEADER_PID PIDFD DIRECTORY` is that member. It imports nothing of gearfall: it
is run as a file, isolated, so that it starts in milliseconds.
"""

import os
import select
import shutil
import signal
import sys
from pathlib import Path


def lead_group(directory: Path) -> int:
    """Make this process the leader of a group that ends with it; return the member's process id.

    Children from here on belong to the group.
    """
    pid = os.getpid()
    os.setpgid(0, 0)
    leader = os.pidfd_open(pid)
    try:
        os.set_inheritable(leader, True)
        command = (sys.executable, "-I", "-S", __file__, str(pid), str(leader), str(directory))
        return os.posix_spawn(sys.executable, command, os.environ)
    finally:
        os.close(leader)


def main(leader_pid: int, leader: int, directory: str) -> None:
    """Wait until the leader has ended; then end all that is left of it, this process too."""
    if os.getpgrp() != leader_pid:
        sys.exit(f"process {os.getpid()} is not in the group of {leader_pid}")
    poller = select.poll()
    poller.register(leader, select.POLLIN)
    poller.poll()
    shutil.rmtree(directory, ignore_errors=True)
    os.killpg(leader_pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
