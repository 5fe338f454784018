"""A lease of etcd that keeps itself alive and knows by its own clock when it is lost."""

import asyncio
import contextlib
import logging
import time
from typing import Any

import grpc

from gearfall.core.errors import Conflict, GearfallError, Unavailable
from gearfall.infra.state.etcd_rpc import EtcdStubs, etcd_errors, invoke, rpc

_log = logging.getLogger(__name__)


class EtcdLease:
    """Renewed every third of its TTL. Lost when etcd says so, or a TTL has passed unrenewed."""

    def __init__(
        self, stubs: EtcdStubs, lease_id: int, ttl_s: float, *, granted_s: float, timeout_s: float
    ) -> None:
        self._stubs = stubs
        self._lease_id = lease_id
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._expires_s = granted_s + ttl_s
        self._lost = asyncio.Event()
        self._call: Any = None
        """The stream of renewals while it works: opening one costs more than a renewal."""
        self._task = asyncio.create_task(self._keep_alive(), name=f"etcd-lease-{lease_id:x}")

    @property
    def lease_id(self) -> int:
        """Number of the lease at etcd."""
        return self._lease_id

    @property
    def is_lost(self) -> bool:
        """Whether it ended or may have ended; stays true once it was.

        Asks the clock, so that a process that was paused too long knows before it does more.
        """
        if time.monotonic() >= self._expires_s:
            self._lost.set()
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        """Return when it is lost."""
        await self._lost.wait()

    async def revoke(self) -> None:
        """End it and delete its keys; Unavailable if etcd can't be told (it then expires)."""
        await self.abandon()
        request = rpc.LeaseRevokeRequest(ID=self._lease_id)
        with contextlib.suppress(Conflict):  # it has ended already
            await invoke(
                self._stubs.lease.LeaseRevoke, request, timeout_s=self._timeout_s, attempts=2
            )

    async def abandon(self) -> None:
        """Stop renewing without telling etcd: the keys stay until the TTL has passed."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        self._lost.set()

    async def _keep_alive(self) -> None:
        try:
            pause_s = self._ttl_s / 3
            while not self.is_lost:
                await asyncio.sleep(pause_s)
                if not self.is_lost:
                    pause_s = self._ttl_s / (3 if await self._is_renewed() else 30)
            _log.warning("lease lost", extra={"lease_id": self._lease_id})
        finally:
            self._lost.set()
            self._end_call()

    async def _is_renewed(self) -> bool:
        asked_s = time.monotonic()
        # A renewal that is still on its way when the lease has run out must not revive it.
        timeout_s = min(self._timeout_s, max(0.01, self._expires_s - asked_s))
        try:
            ttl_s = await self._renew(timeout_s)
        except GearfallError as error:
            _log.info("lease not renewed", extra={"lease_id": self._lease_id, "error": str(error)})
            return False
        # etcd answers 0 for a lease that it no longer knows.
        self._expires_s = asked_s + ttl_s if ttl_s > 0 else 0.0
        return ttl_s > 0

    async def _renew(self, timeout_s: float) -> float:
        if self._call is None:
            self._call = self._stubs.lease.LeaseKeepAlive(wait_for_ready=True)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(self._call)
        except BaseException as error:
            self._end_call()
            if isinstance(error, TimeoutError):
                raise Unavailable("etcd did not renew the lease in time") from None
            raise

    async def _ask(self, call: Any) -> float:
        with etcd_errors():
            await call.write(rpc.LeaseKeepAliveRequest(ID=self._lease_id))
            reply = await call.read()
        if reply is grpc.aio.EOF:
            raise Unavailable("etcd ended the renewal without an answer")
        return float(reply.TTL)

    def _end_call(self) -> None:
        """Cancel the stream: an answer that is on its way would be taken for the next renewal's."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
