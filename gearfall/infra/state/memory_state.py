"""Cluster state in memory, behind the same port as etcd: for unit tests only.

`MemoryStateServer` is the server; each `MemoryState` is one client of it. The server's controls
(`stop`, `start`, `compact`, `wipe`) play the faults that the port promises to survive.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping

from gearfall.core.errors import Conflict, Unavailable
from gearfall.core.ports import (
    Fence,
    KeyDeleted,
    KeyPut,
    Lease,
    Snapshot,
    StateEntry,
    WatchItem,
)


class MemoryStateServer:
    """Keys, leases and history that several clients share, with controls for faults."""

    def __init__(self) -> None:
        self.revision = 1
        self.is_up = True
        self.entries: dict[str, StateEntry] = {}
        self.leases: set[int] = set()
        self._history: list[tuple[int, KeyPut | KeyDeleted]] = []
        self._compacted = 1
        self._lease_ids = itertools.count(1)
        self._change = asyncio.Event()

    def stop(self) -> None:
        """Become unreachable: calls raise Unavailable, watches wait."""
        self.is_up = False

    def start(self) -> None:
        """Become reachable again with all data."""
        self.is_up = True
        self.announce()

    def compact(self) -> None:
        """Forget history: a watch that has not seen all of it gets a fresh snapshot."""
        self._compacted = self.revision
        self._history.clear()
        self.announce()

    def wipe(self) -> None:
        """Lose all data, as a server that comes back with an empty disk."""
        self.restore({}, 1)

    def restore(self, entries: Mapping[str, StateEntry], revision: int) -> None:
        """Come back as of an older revision, as a server whose disk was restored from a backup."""
        self.entries = dict(entries)
        self.leases = {entry.lease_id for entry in entries.values()}
        self._history.clear()
        self.revision = self._compacted = revision
        self.announce()

    def put(self, key: str, value: bytes, lease_id: int) -> int:
        """Write one key at the next revision."""
        self.revision += 1
        old = self.entries.get(key)
        created = old.create_revision if old else self.revision
        entry = StateEntry(key, value, created, self.revision, lease_id)
        self.entries[key] = entry
        self._history.append((self.revision, KeyPut(entry)))
        self.announce()
        return self.revision

    def delete(self, *keys: str) -> None:
        """Delete keys that exist, all at one revision."""
        if not keys:
            return
        self.revision += 1
        for key in keys:
            del self.entries[key]
            self._history.append((self.revision, KeyDeleted(key, self.revision)))
        self.announce()

    def grant(self) -> int:
        """Return the id of a new lease."""
        lease_id = next(self._lease_ids)
        self.leases.add(lease_id)
        return lease_id

    def end_lease(self, lease_id: int) -> None:
        """End a lease and delete its keys. Idempotent."""
        self.leases.discard(lease_id)
        self.delete(*(key for key, entry in self.entries.items() if entry.lease_id == lease_id))

    def changes_after(self, revision: int) -> list[tuple[int, KeyPut | KeyDeleted]] | None:
        """Return the changes after `revision`, or None when history does not hold them all."""
        if not self._compacted <= revision <= self.revision:
            return None
        return [change for change in self._history if change[0] > revision]

    async def wait_change(self) -> None:
        """Return after the next change or control."""
        await self._change.wait()

    def announce(self) -> None:
        """Wake every watch."""
        self._change.set()
        self._change = asyncio.Event()


class MemoryLease:
    """A lease that lives until it is revoked, its client closes, or a test calls `expire`."""

    def __init__(self, server: MemoryStateServer, lease_id: int, ttl_s: float) -> None:
        self._server = server
        self._lease_id = lease_id
        self._ttl_s = ttl_s
        self._lost = asyncio.Event()

    @property
    def lease_id(self) -> int:
        """Number of the lease at the server."""
        return self._lease_id

    @property
    def is_lost(self) -> bool:
        """Whether it ended."""
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        """Return when it ended."""
        await self._lost.wait()

    async def revoke(self) -> None:
        """End it now and delete its keys."""
        if not self._server.is_up:
            raise Unavailable("cluster state is stopped")
        self.expire()

    def expire(self) -> None:
        """Play the end of an unrenewed lease."""
        self._lost.set()
        self._server.end_lease(self._lease_id)

    def abandon(self) -> None:
        """Stop renewing: the lease ends after its TTL."""
        self._lost.set()
        loop = asyncio.get_running_loop()
        loop.call_later(self._ttl_s, self._server.end_lease, self._lease_id)


class MemoryState:
    """One client of a `MemoryStateServer`; with a server of its own if none is given."""

    def __init__(self, server: MemoryStateServer | None = None) -> None:
        self.server = server or MemoryStateServer()
        self._leases: list[MemoryLease] = []
        self._closed = asyncio.Event()

    async def get(self, key: str) -> StateEntry | None:
        """See the port."""
        return self._reach().entries.get(key)

    async def list(self, prefix: str) -> Snapshot:
        """See the port."""
        server = self._reach()
        entries = [entry for key, entry in sorted(server.entries.items()) if key.startswith(prefix)]
        return Snapshot(tuple(entries), server.revision)

    async def put(
        self, key: str, value: bytes, *, lease: Lease | None = None, fence: Fence | None = None
    ) -> int:
        """See the port."""
        server = self._reach()
        self._check(fence, lease)
        return server.put(key, value, lease.lease_id if lease else 0)

    async def compare_and_set(
        self,
        key: str,
        value: bytes,
        *,
        expected_mod_revision: int,
        lease: Lease | None = None,
        fence: Fence | None = None,
    ) -> int:
        """See the port."""
        server = self._reach()
        self._check(fence, lease)
        entry = server.entries.get(key)
        if (entry.mod_revision if entry else 0) != expected_mod_revision:
            raise Conflict(f"{key} is not at revision {expected_mod_revision}")
        return server.put(key, value, lease.lease_id if lease else 0)

    async def delete(self, key: str, *, fence: Fence | None = None) -> int:
        """See the port."""
        server = self._reach()
        self._check(fence, None)
        if key not in server.entries:
            return 0
        server.delete(key)
        return server.revision

    async def grant_lease(self, ttl_s: float) -> MemoryLease:
        """See the port."""
        server = self._reach()
        lease = MemoryLease(server, server.grant(), ttl_s)
        self._leases.append(lease)
        return lease

    async def watch(self, prefix: str) -> AsyncGenerator[WatchItem]:
        """See the port."""
        server, seen = self.server, -1
        while not self._closed.is_set():
            if not server.is_up:
                await server.wait_change()
                continue
            changes = server.changes_after(seen)
            if changes is None:
                snapshot = await self.list(prefix)
                seen = snapshot.revision
                yield snapshot
            elif not changes:
                await server.wait_change()
            for revision, change in changes or ():
                seen = revision
                key = change.entry.key if isinstance(change, KeyPut) else change.key
                if key.startswith(prefix):
                    yield change

    async def close(self) -> None:
        """Close this client only: its leases end after their TTL, its watches end."""
        self._closed.set()
        for lease in self._leases:
            if not lease.is_lost:
                lease.abandon()
        self.server.announce()

    def _reach(self) -> MemoryStateServer:
        if self._closed.is_set() or not self.server.is_up:
            raise Unavailable("cluster state can't be reached")
        return self.server

    def _check(self, fence: Fence | None, lease: Lease | None) -> None:
        if fence is not None:
            holder = self.server.entries.get(fence.key)
            if holder is None or holder.create_revision != fence.create_revision:
                raise Conflict(f"the fence on {fence.key} no longer holds")
        if lease is not None and lease.lease_id not in self.server.leases:
            raise Conflict("the lease of this write has ended")
