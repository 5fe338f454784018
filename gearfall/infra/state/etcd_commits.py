"""Writes that are asked for in one turn of the event loop go to etcd as one transaction.

A transaction waits until the one before is on disk, and every watcher gets it as one message: a few
models that are wanted at once cost hardly more than one. Only writes under the same terms go
together, as what keeps one of them from being written keeps all.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gearfall.core.errors import Conflict
from gearfall.infra.state.etcd_rpc import rpc

MOST_WRITES = 64
"""In one transaction; etcd takes 128 unless it is told otherwise."""
MOST_BYTES = 256 * 1024
"""Of a transaction with more than one write; etcd takes 1.5 MiB."""

Send = Callable[[Any, int], Awaitable[Any]]
"""Sends a TxnRequest, tried so many times at most, and returns etcd's answer."""
_Terms = tuple[int, int, tuple[bytes, ...]]
"""Attempts, lease and encoded compares."""


@dataclass(frozen=True, slots=True)
class Committed:
    """One write that stands."""

    revision: int
    """Shared by all that went together."""
    response: Any
    """etcd's, of this write alone."""


@dataclass(slots=True)
class _Batch:
    compares: Sequence[Any]
    answer: "asyncio.Future[Any]"
    """etcd's, or the error that there is instead: nobody may be left to hear of it."""
    keys: list[str] = field(default_factory=list)
    writes: list[Any] = field(default_factory=list)
    size_bytes: int = 0

    def has_room(self, key: str, size_bytes: int) -> bool:
        is_small = self.size_bytes + size_bytes <= MOST_BYTES
        return is_small and key not in self.keys and len(self.keys) < MOST_WRITES


class EtcdCommits:
    """Owner of the writes that are about to be sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._open: dict[_Terms, _Batch] = {}
        self._sending: set[asyncio.Task[None]] = set()

    async def commit(
        self, key: str, write: Any, compares: Sequence[Any], *, attempts: int, lease_id: int = 0
    ) -> Committed:
        """Write if the compares hold; begun, it goes on though its caller is cancelled.

        Raises Conflict where they do not hold, and what sending raises.
        """
        terms = (attempts, lease_id, tuple(each.SerializeToString() for each in compares))
        size_bytes = write.ByteSize()
        batch = self._open.get(terms)
        if batch is None or not batch.has_room(key, size_bytes):
            loop = asyncio.get_running_loop()
            batch = self._open[terms] = _Batch(compares, loop.create_future())
            loop.call_soon(self._begin, terms, batch)
        place = len(batch.keys)
        batch.keys.append(key)
        batch.writes.append(write)
        batch.size_bytes += size_bytes
        answer = await asyncio.shield(batch.answer)
        if isinstance(answer, Exception):
            # A fresh traceback for each writer: one exception object must not grow them all.
            raise answer.with_traceback(None)
        if not answer.succeeded:
            raise Conflict(f"{key} was not written: its revision or the writer's fence has changed")
        return Committed(int(answer.header.revision), answer.responses[place])

    async def settled(self) -> None:
        """Return when nothing is on its way any more."""
        while self._sending:
            await asyncio.wait(self._sending)

    def _begin(self, terms: _Terms, batch: _Batch) -> None:
        if self._open.get(terms) is batch:
            del self._open[terms]
        task = asyncio.create_task(self._carry_out(terms[0], batch), name="etcd-commit")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _carry_out(self, attempts: int, batch: _Batch) -> None:
        request = rpc.TxnRequest(compare=batch.compares, success=batch.writes)
        try:
            answer = await self._send(request, attempts)
        except Exception as error:
            answer = error
        except BaseException:
            batch.answer.cancel()
            raise
        if not batch.answer.done():
            batch.answer.set_result(answer)
