"""A process that forks spares, apart from the tests' own: that one may have started gRPC.

`python -m tests.services.worker.spare_parent SCENARIO` fails where the spare does not behave.
"""

import os
import signal
import socket
import sys
from typing import NoReturn

from services.worker.processes.spare_engine import SpareEngine, wait_for_engine_socket

_NOT_NEEDED = 7


def answer_a_byte(control: socket.socket) -> NoReturn:
    """What a spare becomes here: it says one byte on the socket that it is handed."""
    engine_socket = wait_for_engine_socket(control)
    if engine_socket is None:
        os._exit(_NOT_NEEDED)
    engine_socket.sendall(b"!")
    os._exit(0)


def hand_over() -> None:
    """A spare becomes the engine whose socket it gets."""
    spare = SpareEngine.fork(answer_a_byte)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert spare.hand(theirs)
        assert ours.recv(1) == b"!"
    assert exit_code_of(spare) == 0


def let_go() -> None:
    """A spare that is not needed ends."""
    spare = SpareEngine.fork(answer_a_byte)
    spare.close()
    spare.close()
    assert exit_code_of(spare) == _NOT_NEEDED


def find_dead() -> None:
    """A dead spare is found out by handing it a socket."""
    spare = SpareEngine.fork(answer_a_byte)
    os.kill(spare.pid, signal.SIGKILL)
    assert exit_code_of(spare) == -signal.SIGKILL
    with socket.socket(socket.AF_UNIX) as engine_socket:
        assert not spare.hand(engine_socket)


def exit_code_of(spare: SpareEngine) -> int:
    """Return how a spare ended."""
    return os.waitstatus_to_exitcode(os.waitpid(spare.pid, 0)[1])


SCENARIOS = {"hand-over": hand_over, "let-go": let_go, "find-dead": find_dead}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()
