"""One child process that is started, watched, restarted when it dies, and stopped in order.

start() --> STARTING --ready--> READY --exit--> WAITING --backoff--> STARTING ...
                |                                  ^
                +------exit or timeout-------------+        stop() from anywhere: STOPPED
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from gearfall.core.errors import Unavailable
from gearfall.infra.local.local_servers import log_tail
from gearfall.infra.local.tether import tethered

_log = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.2
_LAST_DELAY_S = 10.0
_MEMORY_S = 60.0
_PROBE_PAUSE_S = 0.02


class ProcessState(Enum):
    """Where a supervised process is in its life."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    """It died and is started again after a pause."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How to run one process."""

    name: str
    service: str
    argv: Sequence[str]
    log_path: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's own."""
    is_ready: Callable[[], bool] | None = None
    """Asks the process whether it serves; None: it prints one JSON line when it does."""
    ready_timeout_s: float = 120.0
    stop_timeout_s: float = 15.0


def restart_delay_s(exits_s: Sequence[float], now_s: float) -> float:
    """Return how long to wait before the next start: doubles with each exit of the last minute."""
    recent = sum(now_s - exit_s < _MEMORY_S for exit_s in exits_s)
    return min(_LAST_DELAY_S, _FIRST_DELAY_S * 2.0 ** max(0, recent - 1))


class SupervisedProcess:
    """Owner of one child process and of the task that keeps it running."""

    def __init__(self, spec: ProcessSpec, on_change: Callable[[], None] = lambda: None) -> None:
        """`on_change` is called after each start and each exit."""
        self.spec = spec
        self.state = ProcessState.STOPPED
        self.ready_line: Mapping[str, Any] = {}
        """What the process said when it became ready, of its newest incarnation."""
        self.restarts = 0
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._exits_s: list[float] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Process id; 0 while it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    async def start(self) -> None:
        """Start it, return when it is ready, and keep it running from then on.

        Raises Unavailable, with the end of its log, when this first start fails.
        """
        try:
            await self._launch()
        except BaseException:
            await self._end()
            raise
        self._task = asyncio.create_task(self._supervise(), name=f"supervise-{self.spec.name}")

    async def stop(self) -> None:
        """Ask it to end, wait, and kill it if it has not ended in time. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            assert self._process is not None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), self.spec.stop_timeout_s)
        await self._end()

    async def _supervise(self) -> None:
        while True:
            await self._wait_exit()
            now_s = time.monotonic()
            self._exits_s = [*self._exits_s[-20:], now_s]
            delay_s = restart_delay_s(self._exits_s, now_s)
            self._set(ProcessState.WAITING)
            _log.warning(
                "a process of the cluster ended; starting it again",
                extra={"child": self.spec.name, "delay_s": delay_s},
            )
            await asyncio.sleep(delay_s)
            self.restarts += 1
            try:
                await self._launch()
            except Unavailable as error:
                _log.warning(
                    "a process of the cluster did not start",
                    extra={"child": self.spec.name, "error": str(error)},
                )

    async def _launch(self) -> None:
        self._set(ProcessState.STARTING)
        with self.spec.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *tethered(self.spec.argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if self.spec.is_ready is None else log,
                stderr=log,
                env={**os.environ, **self.spec.environment},
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(self.spec.ready_timeout_s):
                await self._wait_ready()
        except TimeoutError:
            await self._end()
            raise Unavailable(self._failure("was not ready in time")) from None
        except Unavailable:
            await self._end()
            raise
        self._set(ProcessState.READY)

    async def _wait_ready(self) -> None:
        assert self._process is not None
        if self.spec.is_ready is None:
            assert self._process.stdout is not None
            self.ready_line = self._parse(await self._process.stdout.readline())
            return
        while not await asyncio.to_thread(self.spec.is_ready):
            if self._process.returncode is not None:
                raise Unavailable(self._failure("ended before it was ready"))
            await asyncio.sleep(_PROBE_PAUSE_S)

    async def _wait_exit(self) -> None:
        """Return when the process has ended and nothing of it is left."""
        assert self._process is not None
        if self._process.stdout is not None:
            # Nothing more is expected; reading keeps a chatty process from blocking on its pipe.
            while await self._process.stdout.read(65536):
                pass
        await self._process.wait()
        await self._end(ProcessState.WAITING)

    async def _end(self, state: ProcessState = ProcessState.STOPPED) -> None:
        """Kill what is left of the process and of the processes that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            self._process = None
        self._set(state)

    def _parse(self, line: bytes) -> Mapping[str, Any]:
        if not line:
            raise Unavailable(self._failure("ended before it was ready"))
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict) or said.get("ready") is not True:
            raise Unavailable(self._failure(f"printed {line[:200]!r} instead of its ready line"))
        return said

    def _failure(self, what: str) -> str:
        return f"{self.spec.name} {what}; its log ends: {log_tail(self.spec.log_path)}"

    def _set(self, state: ProcessState) -> None:
        self.state = state
        self._on_change()
