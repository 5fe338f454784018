"""Reads of the two lanes of a model's queue: with few commands, interactive jobs first.

| the last read                   | this one                                                     |
| ------------------------------- | ------------------------------------------------------------ |
| waited, and left nothing behind | waits at once at both lanes, with one command                |
| else, or a while ago            | looks into one lane after the other; waits if both are empty |
"""

import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from gearfall.core.errors import Conflict, NotFound
from gearfall.core.generation.job import Priority
from gearfall.core.ids import ModelName
from gearfall.infra.queue.redis_lanes import GROUP, LANES, Row, group_creation, row_of
from gearfall.infra.queue.redis_wire import Wires

_STILL_S = 0.01
"""How long a queue is taken to be as empty as a claim left it: one that comes later looks first, so
that interactive jobs which came meanwhile are claimed before batch jobs."""


class Call(Protocol):
    """Runs one command under its deadline and raises errors of the gearfall tree."""

    def __call__(
        self, operation: Callable[[], Awaitable[Any]], *, extra_s: float = 0.0
    ) -> Awaitable[Any]:
        """`extra_s`: how long the command may block."""
        ...


class LaneReads:
    """Owner of what is known of how empty the lanes are."""

    def __init__(self, wires: Wires, call: Call, key: Callable[[ModelName, Priority], str]) -> None:
        """`key` names a lane's stream."""
        self._wires = wires
        self._call = call
        self._key = key
        self._emptied_s: dict[tuple[ModelName, str], float] = {}
        """When a claim that waited left nothing behind."""

    async def read(
        self, model: ModelName, consumer: str, limits: Mapping[Priority, int], block_s: float
    ) -> Sequence[Row]:
        """Return what the lanes have, in their order, or wait until one of them has something."""
        lanes = [lane for lane in LANES if limits[lane] > 0]
        # The count is each stream's own. With room for one, two that get entries at once may give
        # one too many.
        most = max(1, min(limits[lane] for lane in lanes) // len(lanes)) if lanes else 0
        is_empty = time.monotonic() - self._emptied_s.get((model, consumer), -math.inf) < _STILL_S
        if not is_empty or len(lanes) * most > limits[Priority.INTERACTIVE] or block_s <= 0:
            rows = await self._look_into(model, lanes, consumer, limits)
            if rows or block_s <= 0 or not lanes:
                return rows
        rows = await self._read_group(model, lanes, consumer, most, block_s)
        counts = [sum(row[0] is lane for row in rows) for lane in LANES]
        if len(lanes) == len(LANES) and max(counts) < most:
            self._emptied_s[model, consumer] = time.monotonic()
        return rows

    async def _look_into(
        self,
        model: ModelName,
        lanes: Sequence[Priority],
        consumer: str,
        limits: Mapping[Priority, int],
    ) -> Sequence[Row]:
        """Return what the lanes have, all that there is room for of one before the next."""
        rows: list[Row] = []
        for lane in lanes:
            most = min(limits[lane], limits[Priority.INTERACTIVE] - len(rows))
            if most > 0:
                rows += await self._read_group(model, [lane], consumer, most, 0.0)
        return rows

    async def _read_group(
        self,
        model: ModelName,
        lanes: Sequence[Priority],
        consumer: str,
        most: int,
        block_s: float,
    ) -> Sequence[Row]:
        """Return the rows of one XREADGROUP; creates both groups, and once more if one was lost."""
        deadline_s = time.monotonic() + block_s
        keys = {self._key(model, lane): lane for lane in lanes}
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            # BLOCK 0 would mean for ever.
            block = ("BLOCK", max(1, round(left_s * 1000))) if block_s > 0 else ()
            streams = (*keys, *(">" for _ in keys))
            read = partial(
                self._wires.call,
                *("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", most, *block),
                *("STREAMS", *streams),
            )
            try:
                reply = await self._call(read, extra_s=left_s)
            except NotFound:
                for lane in LANES:
                    await self._create_group(self._key(model, lane))
                continue
            return [
                row_of(keys[key.decode()], (raw_id, 1, flat))
                for key, rows in reply or ()
                for raw_id, flat in rows
            ]

    async def _create_group(self, key: str) -> None:
        """Create stream and group; nothing to do if another was faster."""
        with contextlib.suppress(Conflict):
            await self._call(partial(self._wires.call, *group_creation(key)))
