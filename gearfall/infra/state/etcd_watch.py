"""A watch on etcd that survives restarts, lost connections, compaction and lost data.

list --> Snapshot --> stream from its revision + 1 --> changes, in order
  ^                     |              ^
  |                     |              +-- connection lost: again, from the last revision + 1
  +---------------------+-- history compacted, or etcd came back with less than was seen
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc

from gearfall.core.errors import GearfallError, PermissionDenied, Unavailable
from gearfall.core.ports import KeyDeleted, KeyPut, Snapshot, StateEntry, WatchItem
from gearfall.infra.state.etcd_rpc import EtcdStubs, etcd_errors, kv, prefix_end, rpc

_log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.05
_LAST_RETRY_S = 1.0
_OPEN_TIMEOUT_S = 5.0


class _HistoryLostError(Exception):
    """The server can't stream everything since the revision that was asked for."""


class EtcdWatch:
    """Watches one prefix; `items()` is its only use."""

    def __init__(
        self,
        stubs: EtcdStubs,
        root: bytes,
        prefix: bytes,
        list_all: Callable[[], Awaitable[Snapshot]],
        closed: asyncio.Event,
    ) -> None:
        """`root` is cut from keys; `prefix` includes it; `list_all` lists the same prefix.

        `closed`: ends it.
        """
        self._stubs = stubs
        self._root_length = len(root)
        self._prefix = prefix
        self._list_all = list_all
        self._closed = closed
        self._retry_s = _FIRST_RETRY_S
        self._revision: int | None = None

    async def items(self) -> AsyncGenerator[WatchItem]:
        """Yield a Snapshot, then every change; raises only when etcd refuses the credentials."""
        while not self._closed.is_set():
            try:
                if self._revision is None:
                    snapshot = await self._list_all()
                    self._revision = snapshot.revision
                    yield snapshot
                async with contextlib.aclosing(self._stream(self._revision + 1)) as items:
                    async for item in items:
                        yield item
            except _HistoryLostError as error:
                _log.info("watch starts anew from a snapshot", extra={"reason": str(error)})
                self._revision = None
            except PermissionDenied:
                raise
            except GearfallError as error:
                if not self._closed.is_set():
                    _log.warning("watch interrupted", extra={"error": str(error)})
            await self._back_off()

    async def _stream(self, start_revision: int) -> AsyncGenerator[WatchItem]:
        call = self._stubs.watch.Watch(wait_for_ready=True, metadata=(("hasleader", "true"),))
        async with self._ending(call):
            await self._open(call, start_revision)
            while True:
                for event in (await self._read(call)).events:
                    yield self._item(event)

    @contextlib.asynccontextmanager
    async def _ending(self, call: Any) -> AsyncGenerator[None]:
        """Cancel a call on the way out, or as soon as all is closed."""
        closed = asyncio.create_task(self._closed.wait())
        closed.add_done_callback(lambda _: call.cancel())
        try:
            yield
        finally:
            closed.cancel()
            call.cancel()

    async def _open(self, call: Any, start_revision: int) -> None:
        create = rpc.WatchCreateRequest(
            key=self._prefix, range_end=prefix_end(self._prefix), start_revision=start_revision
        )
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                with etcd_errors():
                    await call.write(rpc.WatchRequest(create_request=create))
                reply = await self._read(call)
        except TimeoutError:
            raise Unavailable("etcd did not open the watch in time") from None
        if reply.header.revision < start_revision - 1:
            raise _HistoryLostError("etcd holds an older revision than was seen")
        self._retry_s = _FIRST_RETRY_S

    async def _read(self, call: Any) -> Any:
        with etcd_errors():
            reply = await call.read()
        if reply is grpc.aio.EOF:
            raise Unavailable("etcd ended the watch")
        if reply.canceled and reply.compact_revision:
            raise _HistoryLostError("history was compacted")
        if reply.canceled:
            raise Unavailable(f"etcd cancelled the watch: {reply.cancel_reason}")
        return reply

    def _item(self, event: Any) -> KeyPut | KeyDeleted:
        self._revision = event.kv.mod_revision
        if event.type == kv.Event.DELETE:
            return KeyDeleted(self._relative(event.kv.key), event.kv.mod_revision)
        return KeyPut(entry_from_kv(event.kv, self._root_length))

    def _relative(self, key: bytes) -> str:
        return key[self._root_length :].decode(errors="replace")

    async def _back_off(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._retry_s):
                await self._closed.wait()
        self._retry_s = min(_LAST_RETRY_S, 2 * self._retry_s)


def entry_from_kv(pair: Any, root_length: int) -> StateEntry:
    """Return etcd's key-value pair as the port's entry, its key without the root prefix."""
    return StateEntry(
        key=pair.key[root_length:].decode(errors="replace"),
        value=pair.value,
        create_revision=pair.create_revision,
        mod_revision=pair.mod_revision,
        lease_id=pair.lease,
    )
