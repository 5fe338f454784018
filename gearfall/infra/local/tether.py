"""Runs a command that ends with its parent: `python tether.py PARENT_PID COMMAND [ARGUMENT...]`.

The kernel kills this process when the parent's spawning thread ends, even by SIGKILL (Linux,
PR_SET_PDEATHSIG); the setting outlives the exec of the command. Elsewhere the command just runs.
Imports nothing of gearfall: it is run as a file, isolated, so that it starts in milliseconds.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def tethered(argv: Sequence[str]) -> Sequence[str]:
    """Return the command line that runs `argv` tethered to the calling process."""
    return (sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv)


def main(parent_pid: int, argv: Sequence[str]) -> None:
    """Tether this process to its parent and become the command."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent_pid:  # it died before the setting took hold
            sys.exit(1)
    os.execvp(argv[0], [*argv])  # noqa: S606


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
