"""Joins appends: those that come while a pipeline is under way share the next one.

A lone append goes out at once; under load a hundred cost the event loop one write and one read.

The first append to a model's streams makes their groups too: a server that is full makes none, and
no consumer could claim there what was appended before.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from redis import exceptions

from gearfall.core.errors import GearfallError, Internal, Unavailable
from gearfall.infra.queue.redis_errors import error_from_redis
from gearfall.infra.queue.redis_lanes import group_creation
from gearfall.infra.queue.redis_wire import Command, Wires

MOST_JOINED = 128

Call = Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Append:
    key: str
    fields: dict[bytes, bytes]
    lanes: Sequence[str]
    entry_id: "asyncio.Future[bytes]"


class JoinedAppends:
    """Owner of the appends that were asked for and not yet answered."""

    def __init__(self, wires: Wires, call: Call) -> None:
        """`call` runs one round trip under its deadline and raises errors of the gearfall tree."""
        self._wires = wires
        self._call = call
        self._pending: list[_Append] = []
        self._task: asyncio.Task[None] | None = None

    async def append(self, key: str, fields: dict[bytes, bytes], lanes: Sequence[str]) -> bytes:
        """Return the new entry's id; raise Unavailable when its fate is unknown.

        `lanes`: the streams, `key` among them, that get their groups where it is not there yet.
        """
        entry_id: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pending.append(_Append(key, fields, lanes, entry_id))
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="queue-appends")
        return await entry_id

    async def _run(self) -> None:
        try:
            while self._pending:
                batch = self._pending[:MOST_JOINED]
                del self._pending[:MOST_JOINED]
                await self._send(batch)
        finally:
            self._task = None
            _settle(self._pending, [Unavailable("the append was cancelled")] * len(self._pending))
            self._pending.clear()

    async def _send(self, batch: list[_Append]) -> None:
        """Append to the streams that are there, then to those that are not."""
        await self._add(batch, "NOMKSTREAM")
        if first := [each for each in batch if not each.entry_id.done()]:
            keys = dict.fromkeys(chain.from_iterable(each.lanes for each in first))
            await self._add(first, before=[group_creation(key) for key in keys])

    async def _add(
        self, batch: list[_Append], *options: str, before: Sequence[Command] = ()
    ) -> None:
        answers: list[Any] = [Internal("the append was not answered")] * len(batch)
        try:
            commands: list[Command] = [
                ("XADD", each.key, *options, "*", *chain.from_iterable(each.fields.items()))
                for each in batch
            ]
            replies = await self._call(partial(self._wires.call_all, [*before, *commands]))
            answers = replies[len(before) :]  # the others say at most that a group is there
        except GearfallError as error:
            answers = [type(error)(error.message) for _ in batch]
        finally:
            _settle(batch, answers)


def _settle(batch: list[_Append], answers: list[Any]) -> None:
    for each, answer in zip(batch, answers, strict=True):
        if each.entry_id.done() or answer is None:
            continue  # whoever asked was cancelled, or the stream is not there
        if isinstance(answer, exceptions.RedisError):
            each.entry_id.set_exception(error_from_redis(answer))
        elif isinstance(answer, Exception):
            each.entry_id.set_exception(answer)
        else:
            each.entry_id.set_result(answer)
