"""Cluster state in etcd."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from gearfall.core.errors import Unavailable
from gearfall.core.ports import Fence, Lease, Snapshot, StateEntry, WatchItem
from gearfall.infra.state.etcd_commits import Committed, EtcdCommits
from gearfall.infra.state.etcd_lease import EtcdLease
from gearfall.infra.state.etcd_rpc import EtcdStubs, invoke, open_etcd_channel, prefix_end, rpc
from gearfall.infra.state.etcd_tls import EtcdTls
from gearfall.infra.state.etcd_watch import EtcdWatch, entry_from_kv

DEFAULT_PREFIX = "/gearfall/v1/"


class EtcdState:
    """The `ClusterState` port over etcd v3. Create it inside the running event loop.

    Reads and idempotent writes are tried twice; compare-and-set and delete once, because the
    answer of a repeated one says nothing about the first. All under `timeout_s` an attempt.
    """

    def __init__(
        self,
        endpoints: str,
        *,
        prefix: str = DEFAULT_PREFIX,
        tls: EtcdTls | None = None,
        timeout_s: float = 1.5,
    ) -> None:
        """`endpoints`: URLs of the members, by commas. Connects lazily."""
        self._root = prefix.encode()
        self._timeout_s = timeout_s
        self._stubs = EtcdStubs(open_etcd_channel(endpoints, tls))
        self._commits = EtcdCommits(self._send)
        self._leases: set[EtcdLease] = set()
        self._closed = asyncio.Event()

    async def get(self, key: str) -> StateEntry | None:
        """See the port."""
        reply = await self._read(rpc.RangeRequest(key=self._key(key)))
        return entry_from_kv(reply.kvs[0], len(self._root)) if reply.kvs else None

    async def list(self, prefix: str) -> Snapshot:
        """See the port."""
        start = self._key(prefix)
        reply = await self._read(rpc.RangeRequest(key=start, range_end=prefix_end(start)))
        entries = tuple(entry_from_kv(pair, len(self._root)) for pair in reply.kvs)
        return Snapshot(entries, reply.header.revision)

    async def put(
        self, key: str, value: bytes, *, lease: Lease | None = None, fence: Fence | None = None
    ) -> int:
        """See the port. Raises Conflict also when `lease` has ended."""
        write = rpc.RequestOp(request_put=self._put_request(key, value, lease))
        compares = self._fence_compares(fence)
        return (await self._commit(key, write, compares, lease=lease, attempts=2)).revision

    async def compare_and_set(
        self,
        key: str,
        value: bytes,
        *,
        expected_mod_revision: int,
        lease: Lease | None = None,
        fence: Fence | None = None,
    ) -> int:
        """See the port. Raises Conflict also when `lease` has ended."""
        write = rpc.RequestOp(request_put=self._put_request(key, value, lease))
        expected = rpc.Compare(
            result=rpc.Compare.EQUAL,
            target=rpc.Compare.MOD,
            key=self._key(key),
            mod_revision=expected_mod_revision,
        )
        compares = [expected, *self._fence_compares(fence)]
        return (await self._commit(key, write, compares, lease=lease)).revision

    async def delete(self, key: str, *, fence: Fence | None = None) -> int:
        """See the port."""
        write = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=self._key(key)))
        done = await self._commit(key, write, self._fence_compares(fence))
        return done.revision if done.response.response_delete_range.deleted else 0

    async def grant_lease(self, ttl_s: float) -> EtcdLease:
        """See the port. etcd counts whole seconds (rounded up) and may grant more than asked."""
        asked_s = time.monotonic()
        request = rpc.LeaseGrantRequest(TTL=max(1, math.ceil(ttl_s)))
        # A second attempt may leave an unused lease behind, which expires.
        reply = await self._invoke(self._stubs.lease.LeaseGrant, request, attempts=2)
        lease = EtcdLease(
            self._stubs,
            reply.ID,
            float(reply.TTL),
            granted_s=asked_s,
            timeout_s=self._timeout_s,
        )
        self._leases = {held for held in self._leases if not held.is_lost} | {lease}
        return lease

    async def watch(self, prefix: str) -> AsyncGenerator[WatchItem]:
        """See the port. Waits while etcd can't be reached; ends when this object is closed."""
        start = self._key(prefix)
        list_all = partial(self.list, prefix)
        watch = EtcdWatch(self._stubs, self._root, start, list_all, self._closed)
        async with contextlib.aclosing(watch.items()) as items:
            async for item in items:
                yield item

    async def close(self) -> None:
        """End watches and the renewal of leases (their keys go after the TTL), and disconnect."""
        self._closed.set()
        await asyncio.gather(*(lease.abandon() for lease in self._leases))
        await self._stubs.channel.close()
        await self._commits.settled()

    async def _read(self, request: Any) -> Any:
        return await self._invoke(self._stubs.kv.Range, request, attempts=2)

    async def _commit(
        self,
        key: str,
        write: Any,
        compares: Sequence[Any],
        *,
        lease: Lease | None = None,
        attempts: int = 1,
    ) -> Committed:
        lease_id = lease.lease_id if lease is not None else 0
        return await self._commits.commit(
            key, write, compares, attempts=attempts, lease_id=lease_id
        )

    async def _send(self, request: Any, attempts: int) -> Any:
        return await self._invoke(self._stubs.kv.Txn, request, attempts=attempts)

    async def _invoke(self, method: Any, request: Any, *, attempts: int) -> Any:
        if self._closed.is_set():
            raise Unavailable("the connection to etcd is closed")
        return await invoke(method, request, timeout_s=self._timeout_s, attempts=attempts)

    def _put_request(self, key: str, value: bytes, lease: Lease | None) -> Any:
        lease_id = lease.lease_id if lease is not None else 0
        return rpc.PutRequest(key=self._key(key), value=value, lease=lease_id)

    def _fence_compares(self, fence: Fence | None) -> Sequence[Any]:
        if fence is None:
            return []
        holds = rpc.Compare(
            result=rpc.Compare.EQUAL,
            target=rpc.Compare.CREATE,
            key=self._key(fence.key),
            create_revision=fence.create_revision,
        )
        return [holds]

    def _key(self, key: str) -> bytes:
        return self._root + key.encode()
