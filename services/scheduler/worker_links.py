"""Keeps one connection to each worker and knows within milliseconds when one of them is dead.

A killed process breaks its connections at once; a frozen one fails the keepalive after about 3 s.
Both are earlier than the end of a lease.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gearfall.core.ids import WorkerId
from gearfall.infra.net.grpc_channels import open_channel
from services.scheduler.reachability import REACHABLE, LinkEvent, LinkState, next_state

CONNECT_TIMEOUT_S = 1.0
RETRY_S = 0.5
STEADY_S = 2.0

_SERVING = health_pb2.HealthCheckResponse.SERVING

_log = logging.getLogger(__name__)

Call = grpc.aio.UnaryStreamCall[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class Links(Protocol):
    """What the scheduler asks about the connections to workers."""

    def follow(self, addresses: Mapping[WorkerId, str], keep: Collection[WorkerId]) -> None:
        """Hold connections to `addresses`, and go on with those to `keep` that are known."""
        ...

    def is_down(self, worker_id: WorkerId) -> bool:
        """Whether the worker is known to be out of reach; False for one never heard of."""
        ...

    async def stop(self) -> None:
        """Close all connections. Idempotent."""
        ...


class WorkerLinks:
    """Owner of the connections. Implements `Links`."""

    def __init__(
        self,
        on_change: Callable[[], None],
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        retry_s: float = RETRY_S,
        steady_s: float = STEADY_S,
    ) -> None:
        """`on_change` is called whenever a worker came into reach or went out of it."""
        self._on_change = on_change
        self._connect_timeout_s = connect_timeout_s
        self._retry_s = retry_s
        self._steady_s = steady_s
        self._states: dict[WorkerId, LinkState] = {}
        self._tasks: dict[WorkerId, asyncio.Task[None]] = {}

    def follow(self, addresses: Mapping[WorkerId, str], keep: Collection[WorkerId]) -> None:
        """See the port."""
        for worker_id in self._tasks.keys() - addresses.keys() - set(keep):
            self._tasks.pop(worker_id).cancel()
            del self._states[worker_id]
        for worker_id in addresses.keys() - self._tasks.keys():
            self._states[worker_id] = LinkState.DOUBTFUL
            watch = self._watch(worker_id, addresses[worker_id])
            self._tasks[worker_id] = asyncio.create_task(watch, name=f"link-{worker_id}")

    def is_down(self, worker_id: WorkerId) -> bool:
        """See the port."""
        return self._states.get(worker_id, LinkState.UP) not in REACHABLE

    async def stop(self) -> None:
        """See the port."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        self._states.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, worker_id: WorkerId, address: str) -> None:
        while True:
            # A task of its own: a call that is cancelled beneath it must not end the watch.
            held = asyncio.create_task(self._hold(worker_id, address))
            try:
                await asyncio.wait({held})
            except asyncio.CancelledError:
                held.cancel()
                await asyncio.wait({held})
                raise
            if not held.cancelled() and (error := held.exception()):
                _log.error("a link failed", extra={"worker": worker_id}, exc_info=error)
            self._apply(worker_id, LinkEvent.BROKE)
            if self._states.get(worker_id) is not LinkState.DOUBTFUL:
                await asyncio.sleep(self._retry_s)

    async def _hold(self, worker_id: WorkerId, address: str) -> None:
        """Make one connection and return when it is broken or the worker serves no more."""
        steady: asyncio.TimerHandle | None = None
        with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
            async with open_channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                call: Call = stub.Watch(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
                try:
                    async with asyncio.timeout(self._connect_timeout_s):
                        is_serving = await _next_says_serving(call)
                    if is_serving:
                        self._apply(worker_id, LinkEvent.SERVES)
                        steady = asyncio.get_running_loop().call_later(
                            self._steady_s, self._apply, worker_id, LinkEvent.STEADY
                        )
                    while is_serving:
                        is_serving = await _next_says_serving(call)
                finally:
                    if steady is not None:
                        steady.cancel()
                    call.cancel()

    def _apply(self, worker_id: WorkerId, event: LinkEvent) -> None:
        before = self._states.get(worker_id)
        if before is None:
            return
        after = self._states[worker_id] = next_state(before, event)
        if (before in REACHABLE) != (after in REACHABLE):
            _log.warning("worker link", extra={"worker": worker_id, "state": after.value})
            self._on_change()


async def _next_says_serving(call: Call) -> bool:
    reply = await call.read()
    return isinstance(reply, health_pb2.HealthCheckResponse) and reply.status == _SERVING
