"""Tells the scheduler, once per model, that jobs wait; takes it back when none does."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from gearfall.core.errors import GearfallError
from gearfall.core.ids import ModelName, RouterId
from gearfall.core.ports import Lease
from gearfall.core.records import DemandRecord

_log = logging.getLogger(__name__)

OVERDUE_S = 0.2
"""A job that waits this long unclaimed is demand, whatever the view says about ready replicas."""
_RETRY_S = 0.5


class DemandWriter(Protocol):
    """The part of the cluster that demand needs."""

    async def put_demand(self, record: DemandRecord, *, lease: Lease) -> int:
        """Write the record under the router's lease."""
        ...

    async def delete_demand(self, model: ModelName, router_id: RouterId) -> int:
        """Delete the record."""
        ...


class DemandBoard:
    """Keeps the demand records of this router equal to what waits here. A WaitingRoom."""

    def __init__(
        self,
        writer: DemandWriter,
        router_id: RouterId,
        is_ready: Callable[[ModelName], bool],
    ) -> None:
        """`is_ready`: whether a ready replica of the model is known."""
        self._writer = writer
        self._router_id = router_id
        self._is_ready = is_ready
        self._lease: Lease | None = None
        self._waiting: dict[ModelName, int] = {}
        self._overdue: set[ModelName] = set()
        self._timers: dict[ModelName, asyncio.TimerHandle] = {}
        self._published: set[ModelName] = set()
        self._dirty: set[ModelName] = set()
        self._wake = asyncio.Event()

    @property
    def waiting(self) -> Mapping[ModelName, int]:
        """Unclaimed jobs of this router by model."""
        return self._waiting

    def set_waiting(self, model: ModelName, count: int) -> None:
        """Take note of how many jobs of `model` wait now."""
        if count == 0:
            self._waiting.pop(model, None)
            self._overdue.discard(model)
            timer = self._timers.pop(model, None)
            if timer is not None:
                timer.cancel()
            if model in self._published:
                self._touch(model)
            return
        self._waiting[model] = count
        if model in self._published or model in self._timers:
            return
        loop = asyncio.get_running_loop()
        self._timers[model] = loop.call_later(OVERDUE_S, self._become_overdue, model)
        if not self._is_ready(model):
            self._touch(model)

    def set_lease(self, lease: Lease) -> None:
        """The router has a new lease: what stood under the old one is written again."""
        self._lease = lease
        self._published.clear()
        self._dirty |= set(self._waiting)
        self._wake.set()

    async def run(self) -> None:
        """Write what changed, for ever. One write at a time; failures are tried again."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for model in tuple(self._dirty):
                self._dirty.discard(model)
                await self._reconcile(model)

    def _become_overdue(self, model: ModelName) -> None:
        self._timers.pop(model, None)
        if model in self._waiting:
            self._overdue.add(model)
            self._touch(model)

    def _touch(self, model: ModelName) -> None:
        self._dirty.add(model)
        self._wake.set()

    async def _reconcile(self, model: ModelName) -> None:
        count = self._waiting.get(model, 0)
        is_published = model in self._published
        wants = count > 0 and (model in self._overdue or not self._is_ready(model))
        try:
            if wants and not is_published and self._lease is not None:
                await self._publish(model, count, self._lease)
            elif count == 0 and is_published:
                self._published.discard(model)
                await self._writer.delete_demand(model, self._router_id)
        except GearfallError as error:
            _log.warning("could not write demand", extra={"model": model, "error": error.message})
            self._published ^= {model}
            asyncio.get_running_loop().call_later(_RETRY_S, self._touch, model)

    async def _publish(self, model: ModelName, count: int, lease: Lease) -> None:
        self._published.add(model)
        record = DemandRecord(model, self._router_id, count, time.time())
        await self._writer.put_demand(record, lease=lease)
        if model not in self._waiting:
            self._touch(model)
