"""The cluster as this router sees it: stores, workers, queues, and what is degraded."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping

from gearfall.core.errors import Conflict, GearfallError
from gearfall.core.ids import ModelName, RouterId
from gearfall.core.ports import ClusterState, JobQueue, QueueDepth
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.pb import router_pb2 as pb
from gearfall.pb import store_pb2, worker_pb2
from services.router.cluster.peers import Peers
from services.router.cost_metrics import Costs

_PROBE_S = 1.0
_FRESH_S = 1.0
"""So long what probes found is told again: anyone may ask for metrics, and each probe is a write at
etcd."""
_PROBE_KEY = "routers/probe"
_NO_REVISION = 2**62
"""That no key ever has."""


class ClusterStatus:
    """Reads what is true now; parts that do not answer are named, never waited for."""

    def __init__(
        self,
        *,
        router_id: RouterId,
        view: Callable[[], ClusterView],
        state: ClusterState,
        queue: JobQueue,
        peers: Peers,
        waiting: Callable[[], Mapping[ModelName, int]],
        running_requests: Callable[[], int],
        alarms: Callable[[], list[str]],
        costs: Mapping[str, Costs],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`waiting`: unclaimed jobs of this router by model. `costs`: by deployment.

        `clock`: monotonic seconds.
        """
        self._router_id = router_id
        self._view = view
        self._state = state
        self._queue = queue
        self._peers = peers
        self._waiting = waiting
        self._running_requests = running_requests
        self._alarms = alarms
        self._costs = costs
        self._clock = clock
        self._probing = asyncio.Lock()
        self._reachable: dict[str, bool] = {}
        self._probed_s = -math.inf

    async def read(self) -> pb.GetStatusReply:
        """Return the whole status within a few seconds."""
        stores, workers, depths, degraded = await asyncio.gather(
            self._peers.store_statuses(),
            self._peers.worker_statuses(),
            self.queue_depths(),
            self.degraded(),
        )
        view = self._view()
        silent = [each for each in (*stores, *workers) if isinstance(each, str)]
        return pb.GetStatusReply(
            nodes=[each for each in stores if isinstance(each, store_pb2.StoreStatus)],
            workers=[each for each in workers if isinstance(each, worker_pb2.WorkerStatus)],
            queues=[
                pb.QueueStatus(model=model, waiting=depth.waiting, claimed=depth.claimed)
                for model, depth in sorted(depths.items())
            ],
            leader=view.leader.scheduler_id if view.leader else "",
            running_requests=self._running_requests(),
            router_id=self._router_id,
            degraded=[*degraded, *silent],
            alarms=self._alarms(),
            costs=[
                pb.DeploymentCosts(
                    name=name,
                    device_s=each.device_s,
                    cost_flops=each.flops,
                    start_s=each.start_s,
                    degraded_answers=each.degraded_answers,
                )
                for name, each in sorted(self._costs.items())
            ],
        )

    async def degraded(self) -> list[str]:
        """Say in words which parts can't be reached; empty when all can."""
        state, writes, queue = await asyncio.gather(
            self._probe_state(), self._probe_writes(), self._probe_queue()
        )
        view = self._view()
        words = [each for each in (state or writes, queue) if each]
        if view.leader is None:
            words.append("no scheduler leads: no model can be started")
        if not view.workers:
            words.append("no worker is up: nothing can be answered")
        if not view.nodes:
            words.append("no store is up: nothing can be loaded or registered")
        without = {each.node_id for each in view.workers.values()} - view.nodes.keys()
        words += [f"node {each} has workers and no store" for each in sorted(without) if view.nodes]
        return words

    async def unreachable(self) -> list[str]:
        """Say which of cluster state and the queue can't be reached."""
        return [
            each for each in await asyncio.gather(self._probe_state(), self._probe_queue()) if each
        ]

    async def reachable(self) -> dict[str, bool]:
        """Return whether cluster state answers, whether it takes writes, and the queue answers.

        As of a second ago at most; one probe serves all who ask meanwhile.
        """
        async with self._probing:
            if self._clock() - self._probed_s >= _FRESH_S:
                self._reachable = await self._probe_parts()
                self._probed_s = self._clock()
            return dict(self._reachable)

    async def _probe_parts(self) -> dict[str, bool]:
        probes = {
            "state": self._probe_state(),
            "writes": self._probe_writes(),
            "queue": self._probe_queue(),
        }
        reasons = await asyncio.gather(*probes.values())
        return {part: not why for part, why in zip(probes, reasons, strict=True)}

    async def queue_depths(self) -> dict[ModelName, QueueDepth]:
        """Return the depth of the queues that are in use; without those that can't be read."""
        view = self._view()
        models = {model for _, model in view.replicas} | set(self._waiting())
        known = sorted(model for model in models if model in view.models)
        depths = await asyncio.gather(*(self._depth(model) for model in known))
        return {
            model: depth for model, depth in zip(known, depths, strict=True) if depth is not None
        }

    async def _depth(self, model: ModelName) -> QueueDepth | None:
        try:
            async with asyncio.timeout(_PROBE_S):
                return await self._queue.depth(model)
        except (GearfallError, TimeoutError):
            return None

    async def _probe_state(self) -> str:
        try:
            async with asyncio.timeout(_PROBE_S):
                await self._state.get(_PROBE_KEY)
        except (GearfallError, TimeoutError) as error:
            return f"cluster state can't be reached, going on from the last known: {_text(error)}"
        return ""

    async def _probe_writes(self) -> str:
        """Ask for a write that comes about under no circumstances: a full etcd refuses it first."""
        try:
            async with asyncio.timeout(_PROBE_S):
                with contextlib.suppress(Conflict):
                    await self._state.compare_and_set(
                        _PROBE_KEY, b"", expected_mod_revision=_NO_REVISION
                    )
        except (GearfallError, TimeoutError) as error:
            return f"cluster state takes no writes, no model can be started: {_text(error)}"
        return ""

    async def _probe_queue(self) -> str:
        try:
            async with asyncio.timeout(_PROBE_S):
                await self._queue.depth(ModelName("probe"))
        except (GearfallError, TimeoutError) as error:
            return f"the job queue can't be reached: {_text(error)}"
        return ""


def _text(error: Exception) -> str:
    return error.message if isinstance(error, GearfallError) else "no answer in time"
