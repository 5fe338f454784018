"""Notices that the queue's server came back as another process, whoever connects to it next.

A server that syncs its log each second may have answered what it then forgot: what was acknowledged
in its last moments can be there again after a restart, what was claimed can be unclaimed. redis-py
reconnects without a word, so each new connection asks which process it has reached.
"""

from collections.abc import Callable
from typing import Any

_RUN_ID = b"run_id:"


class RestartWatch:
    """Owner of what is known of the server's process."""

    def __init__(self, on_restart: Callable[[], None]) -> None:
        """`on_restart` is called, on the event loop, when another process answers."""
        self._on_restart = on_restart
        self._run_id: bytes | None = None
        self.restarts = 0
        """How often another process answered than before."""

    async def greet(self, connection: Any) -> None:
        """Set a new connection up and ask; redis-py calls it for each that it opens."""
        await connection.on_connect()
        await connection.send_command("INFO", "server", check_health=False)
        self._hear(_run_id_in(await connection.read_response(disable_decoding=True)))

    def _hear(self, run_id: bytes) -> None:
        known, self._run_id = self._run_id, run_id
        if known not in {None, run_id}:
            self.restarts += 1
            self._on_restart()


def _run_id_in(info: bytes) -> bytes:
    """Return the server's name for its own process; empty, always the same, where it has none."""
    lines = (line for line in info.splitlines() if line.startswith(_RUN_ID))
    return next(lines, _RUN_ID).removeprefix(_RUN_ID)
