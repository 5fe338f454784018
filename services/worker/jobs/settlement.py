"""Acknowledges queue entries in the background, again and again until the queue has heard it."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from gearfall.core.errors import GearfallError
from gearfall.core.ids import ModelName
from gearfall.core.ports import JobQueue

RETRY_S = 0.5

_log = logging.getLogger(__name__)


class Settlement:
    """Owner of the entries that are done with but not yet acknowledged."""

    def __init__(self, queue: JobQueue, *, retry_s: float = RETRY_S) -> None:
        self._queue = queue
        self._retry_s = retry_s
        self._pending: dict[ModelName, list[str]] = {}
        self._added = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin in the background."""
        self._task = asyncio.create_task(self._run(), name="settlement")

    async def stop(self, *, timeout_s: float = 1.0) -> None:
        """Try to acknowledge what is pending, briefly, and end. Idempotent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.wait_empty()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def acknowledge(self, model: ModelName, entry_ids: Sequence[str]) -> None:
        """Acknowledge these entries as soon as the queue can be reached."""
        self._pending.setdefault(model, []).extend(entry_ids)
        self._empty.clear()
        self._added.set()

    async def wait_empty(self) -> None:
        """Return when nothing is pending."""
        await self._empty.wait()

    async def _run(self) -> None:
        while True:
            await self._added.wait()
            self._added.clear()
            for model in tuple(self._pending):
                await self._settle(model)
            if not self._pending:
                self._empty.set()

    async def _settle(self, model: ModelName) -> None:
        entry_ids = self._pending.pop(model)
        try:
            await self._queue.acknowledge(model, entry_ids)
        except GearfallError as error:
            _log.warning("entries not acknowledged", extra={"error": error.message})
            self._pending[model] = entry_ids + self._pending.get(model, [])
            self._added.set()
            await asyncio.sleep(self._retry_s)
