"""A process that a zygote forks ahead of need: rehearsed, and waiting to be told whom to serve.

It becomes the next engine by being handed that engine's socket. One that has died meanwhile is
found out by the hand-over, and the zygote forks as it would without a spare.
"""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import NoReturn

_ONE_BYTE = b"\0"


class SpareEngine:
    """The zygote's end of one spare process."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self._control = control

    @classmethod
    def fork(cls, run: Callable[[socket.socket], NoReturn]) -> "SpareEngine":
        """Fork one that runs `run` with its end of a socket pair. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = os.fork()
            except BaseException:
                ours.close()
                raise
            if pid == 0:
                ours.close()
                run(theirs)
        return cls(pid, ours)

    def hand(self, engine_socket: socket.socket) -> bool:
        """Make it the engine that speaks on `engine_socket`; False when it is dead."""
        with self._control, contextlib.suppress(OSError):
            return socket.send_fds(self._control, [_ONE_BYTE], [engine_socket.fileno()]) == 1
        return False

    def close(self) -> None:
        """Let go of it: it exits, or has. Idempotent."""
        self._control.close()


def wait_for_engine_socket(control: socket.socket) -> socket.socket | None:
    """Return, in the spare process, the socket that it was handed; None when it is not needed."""
    with control, contextlib.suppress(ConnectionError):
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if descriptors:
            return socket.socket(fileno=descriptors[0])
    return None
