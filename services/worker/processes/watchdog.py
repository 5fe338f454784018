"""Notices an engine that has frozen: asked whether it is there, silent, and using no processor.

A step may take long, and a held job is silent for as long as its source is: so an engine that says
nothing is asked, and one that does not answer lives for as long as it computes, itself or by
processes of its own, whose group it leads then.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from services.worker.engine_link.messages import ProbeEngine
from services.worker.ports import EngineProcess

LOOK_EVERY_S = 0.5
PROBE_AFTER_LOOKS = 2
"""Looks in a row, with work there, at which nothing was heard, before it is asked."""
KILL_AFTER_LOOKS = 6
"""Further ones without an answer or a tick of processor time, before it is killed."""

_log = logging.getLogger(__name__)


def processor_ticks(pid: int) -> int | None:
    """Return the processor time of a process, and of its group if it leads one.

    None when it is gone.
    """
    if (own := _group_and_ticks(pid)) is None:
        return None
    group, ticks = own
    if group != pid:
        return ticks
    each = (_group_and_ticks(int(path.name)) for path in Path("/proc").glob("[0-9]*"))
    return sum(one[1] for one in each if one is not None and one[0] == group)


def _group_and_ticks(pid: int) -> tuple[int, int] | None:
    """Return a process's group and the processor time of all its threads; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in brackets may hold anything.
    fields = stat.rpartition(")")[2].split()
    return int(fields[2]), int(fields[11]) + int(fields[12])


class Watchdog:
    """Looks after one engine. Counts looks, not time: a worker that was frozen missed none."""

    def __init__(
        self,
        engine: EngineProcess,
        has_work: Callable[[], bool],
        *,
        ticks_of: Callable[[int], int | None] = processor_ticks,
    ) -> None:
        self._engine = engine
        self._has_work = has_work
        self._ticks_of = ticks_of
        self._silent_looks = 0
        self._ticks: int | None = None

    def heard(self) -> None:
        """The engine said something."""
        self._silent_looks = 0

    def look(self) -> None:
        """Ask the engine, or kill it, when it was silent for too many looks."""
        if not self._has_work():
            self._silent_looks = 0
            return
        self._silent_looks += 1
        if self._silent_looks < PROBE_AFTER_LOOKS:
            return
        ticks = self._ticks_of(self._engine.pid)
        if self._silent_looks == PROBE_AFTER_LOOKS:
            self._engine.send(ProbeEngine())
        elif ticks != self._ticks:
            self._silent_looks = PROBE_AFTER_LOOKS
        self._ticks = ticks
        if self._silent_looks >= PROBE_AFTER_LOOKS + KILL_AFTER_LOOKS and ticks is not None:
            _log.error("engine is frozen, killing it", extra={"pid": self._engine.pid})
            self._engine.kill()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()


@asynccontextmanager
async def watching(engine: EngineProcess, has_work: Callable[[], bool]) -> AsyncIterator[Watchdog]:
    """Look after `engine` until the block ends."""
    watchdog = Watchdog(engine, has_work)
    task = asyncio.create_task(watchdog.run(), name="engine-watchdog")
    try:
        yield watchdog
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
