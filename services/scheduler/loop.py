"""The scheduler's life: campaign, lead until deposed, campaign again. Followers only watch.

One decision at a time: the next is made from a view that shows what the last one wrote.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from gearfall.core.errors import Conflict, Unavailable
from gearfall.core.ids import WorkerId
from gearfall.core.ports import Fence, Lease
from gearfall.core.records import SchedulerRecord
from gearfall.infra.cluster import Cluster
from gearfall.infra.election import campaign, resign, wait_deposed
from gearfall.scheduling.actions import (
    Action,
    Assign,
    BeginMove,
    Decide,
    EndMove,
    Unassign,
    Unwish,
    Wish,
)
from gearfall.scheduling.autoscaler import SchedulerPolicy
from gearfall.scheduling.reconcile import reconcile
from gearfall.scheduling.snapshot import (
    ClusterSnapshot,
    on_bases,
    placeable,
    waiting_by_model,
)
from services.scheduler.metrics import SchedulerFigures, SchedulerMetrics
from services.scheduler.reachability import LEASE_GRACE_S, note_absent
from services.scheduler.start_learning import StartLearning
from services.scheduler.worker_links import Links, WorkerLinks

LEASE_TTL_S = 5.0
RETRY_S = 0.5
"""Pause before cluster state is tried again after it could not be reached."""
_OWN_KINDS = frozenset({"decisions", "leader", "schedulers", "routers"})
"""Kinds whose change changes no decision."""

_log = logging.getLogger(__name__)


class SchedulerLoop:
    """Owner of one scheduler's candidacy, its decisions and what it learned from starts."""

    def __init__(
        self,
        cluster: Cluster,
        policy: SchedulerPolicy,
        *,
        clock: Callable[[], float] = time.time,
        lease_ttl_s: float = LEASE_TTL_S,
        make_links: Callable[[Callable[[], None]], Links] = WorkerLinks,
        metrics: SchedulerMetrics | None = None,
    ) -> None:
        """`make_links` gets what is to be called when a worker's reachability changed."""
        self._metrics = metrics or SchedulerMetrics()
        self._cluster = cluster
        self._policy = policy
        self._clock = clock
        self._lease_ttl_s = lease_ttl_s
        self._changed = asyncio.Event()
        self._links = make_links(self._changed.set)
        self._absent_since_unix_s: dict[WorkerId, float] = {}
        self._task: asyncio.Task[None] | None = None
        self.fence: Fence | None = None
        """Set while this scheduler leads."""
        self.starts = StartLearning(self._metrics.observe_start)

    def start(self, record: SchedulerRecord) -> None:
        """Begin to campaign in the background as `record`."""
        self._task = asyncio.create_task(self._run(record), name="scheduler")

    async def stop(self) -> None:
        """Give up leadership at once and end. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self, record: SchedulerRecord) -> None:
        while True:
            try:
                await self._one_term(record)
            except Conflict as error:
                _log.warning("deposed by a fence", extra={"error": error.message})
            except Unavailable as error:
                _log.warning("cluster state can't be reached", extra={"error": error.message})
                await asyncio.sleep(RETRY_S)

    async def _one_term(self, record: SchedulerRecord) -> None:
        """Campaign once and lead until deposed."""
        lease = await self._cluster.grant_lease(self._lease_ttl_s)
        try:
            await self._cluster.put_scheduler(record, lease=lease)
            self.fence = await campaign(self._cluster.state, record, lease)
            _log.info("leads", extra={"fence": self.fence.create_revision})
            await self._lead(self.fence, lease)
        finally:
            self.fence = None
            with contextlib.suppress(Unavailable):
                await resign(lease)

    async def _lead(self, fence: Fence, lease: Lease) -> None:
        """Decide until deposed; raises Conflict when a write met another leader's fence."""
        tasks = (
            asyncio.create_task(wait_deposed(self._cluster.state, fence, lease)),
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._decide_for_ever(fence)),
        )
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            _log.warning("no longer leads", extra={"fence": fence.create_revision})
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._links.stop()

    async def _listen(self) -> None:
        async with contextlib.aclosing(self._cluster.changes()) as changes:
            async for kinds in changes:
                if kinds - _OWN_KINDS:
                    self._changed.set()

    async def _decide_for_ever(self, fence: Fence) -> None:
        await self._cluster.wait_seen(fence.create_revision)
        self._changed.set()
        due_unix_s: float | None = None
        while True:
            await self._wait_changed_or(due_unix_s)
            self._changed.clear()
            try:
                due_unix_s = await self._decide(fence)
            except Unavailable as error:
                _log.warning("decision not written", extra={"error": error.message})
                due_unix_s = self._clock() + RETRY_S

    async def _wait_changed_or(self, due_unix_s: float | None) -> None:
        delay_s = None if due_unix_s is None else max(0.0, due_unix_s - self._clock())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._changed.wait()

    async def _decide(self, fence: Fence) -> float | None:
        """Make and write one decision; return when the next is due though nothing changes."""
        self._follow_workers()
        snapshot = self.snapshot()
        self.starts.learn(snapshot)
        began_s = time.perf_counter()
        plan = reconcile(snapshot, self.starts.costs, self._policy, self._clock())
        self._metrics.observe_placement(time.perf_counter() - began_s)
        seen = 0
        for action in plan.actions:
            seen = max(seen, await self._write(action, fence))
        await self._cluster.wait_seen(seen)
        return plan.next_due_unix_s

    async def _write(self, action: Action, fence: Fence) -> int:
        revision = 0
        match action:
            case Assign(assignment):
                _log.info(
                    "assigned",
                    extra={
                        "model": assignment.model,
                        "worker": assignment.worker_id,
                        "reason": assignment.reason,
                        "predicted_s": assignment.predicted_start_s,
                    },
                )
                revision = await self._cluster.put_assignment(assignment, fence=fence)
            case Unassign((worker_id, model), reason):
                _log.info(
                    "unassigned", extra={"model": model, "worker": worker_id, "reason": reason}
                )
                await self._cluster.delete_assignment(worker_id, model, fence=fence)
            case BeginMove(move):
                revision = await self._cluster.put_move(move, fence=fence)
            case EndMove((worker_id, model), _):
                await self._cluster.delete_move(worker_id, model, fence=fence)
            case Wish(prefetch):
                revision = await self._cluster.put_prefetch(prefetch, fence=fence)
            case Unwish((node_id, model), _):
                await self._cluster.delete_prefetch(node_id, model, fence=fence)
            case Decide(decision):
                revision = await self._cluster.put_decision(decision, fence=fence)
                self._metrics.count_decision(decision.decision)
        return revision

    def _follow_workers(self) -> None:
        """Keep a connection to every worker, and to those that left but have assignments."""
        view = self._cluster.view
        absent = {worker_id for worker_id, _ in view.assignments} - view.workers.keys()
        self._absent_since_unix_s = note_absent(self._absent_since_unix_s, absent, self._clock())
        self._links.follow({each.worker_id: each.address for each in view.workers.values()}, absent)

    def snapshot(self) -> ClusterSnapshot:
        """Return the view as decisions are made from it."""
        view = self._cluster.view
        return ClusterSnapshot(
            models=placeable(view.models),
            deployments=on_bases(view.deployments, view.models),
            nodes=view.nodes,
            workers=view.workers,
            assignments=view.assignments,
            replicas=view.replicas,
            demand=tuple(view.demand.values()),
            decisions=view.decisions,
            unreachable=frozenset(filter(self._links.is_down, view.workers)),
            awaited={
                worker_id: since_unix_s + LEASE_GRACE_S
                for worker_id, since_unix_s in self._absent_since_unix_s.items()
                if not self._links.is_down(worker_id)
            },
        )

    def render_metrics(self) -> bytes:
        """Return what Prometheus scrapes."""
        view, fence = self._cluster.view, self.fence
        waiting = waiting_by_model(tuple(view.demand.values()))
        down = sum(map(self._links.is_down, view.workers))
        return self._metrics.render(
            SchedulerFigures(
                is_leader=fence is not None,
                fence_revision=fence.create_revision if fence else 0,
                reachable_workers=len(view.workers) - down,
                unreachable_workers=down,
                waiting_jobs={model: each.jobs for model, each in waiting.items()},
                costs=self.starts.costs,
            )
        )
