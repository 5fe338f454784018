"""What a cluster's processes had of the machine while it served, twice a second.

Processor time, and the time that they could have computed and had no core, from Linux's /proc.
Engines are not in it: they log each of their steps (`services/worker/engine/step_log.py`).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.5
_NANOSECONDS = 1e9


@dataclass(frozen=True, slots=True)
class CoreTime:
    """Of one process without its children, all its threads, since it began."""

    run_s: float
    waited_s: float
    """For a core."""


@dataclass(frozen=True, slots=True)
class MachineSample:
    """All processes at one moment."""

    at_s: float
    """On the monotonic clock."""
    processes: Mapping[str, CoreTime]


@contextlib.asynccontextmanager
async def sampling(pids: Mapping[str, int]) -> AsyncIterator[list[MachineSample]]:
    """Take samples while the body runs, one right at each end."""
    samples = [_sample(pids)]

    async def go_on() -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            samples.append(_sample(pids))

    task = asyncio.create_task(go_on())
    try:
        yield samples
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        samples.append(_sample(pids))


def _sample(pids: Mapping[str, int]) -> MachineSample:
    now_s = time.monotonic()
    return MachineSample(now_s, {name: _core_time(pid) for name, pid in pids.items()})


def _core_time(pid: int) -> CoreTime:
    run_ns = waited_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            run, waited, _ = path.read_text().split()
            run_ns, waited_ns = run_ns + int(run), waited_ns + int(waited)
    return CoreTime(run_ns / _NANOSECONDS, waited_ns / _NANOSECONDS)
