"""The scheduler's life: campaign, lead until deposed, campaign again. Others stand by meanwhile."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from gearfall.core.errors import Conflict, Unavailable
from gearfall.core.generation.history import Led
from gearfall.core.ports import Fence, Lease
from gearfall.core.records import SchedulerRecord
from gearfall.infra.history_log import record as record_history
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.election import campaign, resign, wait_deposed
from gearfall.scheduling.baselines.baseline import DecideStep
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.snapshot import waiting_by_model
from services.scheduler.fleet_follower import FleetFollower
from services.scheduler.learned import WRITE_EVERY_S
from services.scheduler.metrics import SchedulerFigures, SchedulerMetrics
from services.scheduler.standby import Standby
from services.scheduler.start_learning import StartLearning
from services.scheduler.term import RETRY_S, Term
from services.scheduler.worker_links import Links, WorkerLinks

LEASE_TTL_S = 5.0

_log = logging.getLogger(__name__)


class SchedulerLoop:
    """Owner of one scheduler's candidacy, its terms and what it learned from starts."""

    def __init__(
        self,
        cluster: Cluster,
        policy: SchedulerPolicy,
        *,
        decide: DecideStep = decide,
        clock: Callable[[], float] = time.time,
        lease_ttl_s: float = LEASE_TTL_S,
        learn_every_s: float = WRITE_EVERY_S,
        make_links: Callable[[Callable[[], None]], Links] = WorkerLinks,
        metrics: SchedulerMetrics | None = None,
        on_settled: Callable[[], None] = lambda: None,
        on_left: Callable[[], None] = lambda: None,
    ) -> None:
        """`make_links` gets what is to be called when a worker's reachability changed.

        `on_settled` is called behind a term's first decision: what stands then is there to stay.
        `on_left` is called behind a term, whether it led or not, once nothing holds what it had.
        """
        self._metrics = metrics or SchedulerMetrics()
        self._cluster = cluster
        self._policy = policy
        self._decide = decide
        self._clock = clock
        self._lease_ttl_s = lease_ttl_s
        self._learn_every_s = learn_every_s
        self._on_settled = on_settled
        self._on_left = on_left
        self._links = make_links(self._note_link)
        self._task: asyncio.Task[None] | None = None
        self._term: Term | None = None
        self.fence: Fence | None = None
        """Set while this scheduler leads."""
        self.starts = StartLearning(self._metrics.observe_start)

    def start(self, record: SchedulerRecord) -> None:
        """Begin to campaign in the background as `record`."""
        self._task = asyncio.create_task(self._run(record), name="scheduler")

    async def wait_failed(self) -> None:
        """Return never, or raise what ended the loop though nobody stopped it."""
        assert self._task is not None, "not started"
        await asyncio.shield(self._task)

    async def stop(self) -> None:
        """Give up leadership at once and end. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, record: SchedulerRecord) -> None:
        while True:
            try:
                await self._one_term(record)
            except Conflict as error:
                _log.warning("deposed by a fence", extra={"error": error.message})
            except Unavailable as error:
                _log.warning("cluster state can't be reached", extra={"error": error.message})
                await asyncio.sleep(RETRY_S)
            finally:
                # What woke this task up still holds how the term ended, until its turn is over.
                asyncio.get_running_loop().call_soon(self._on_left)

    async def _one_term(self, record: SchedulerRecord) -> None:
        """Campaign once and lead until deposed."""
        lease = await self._cluster.grant_lease(self._lease_ttl_s)
        try:
            await self._cluster.put_scheduler(record, lease=lease)
            with self._cluster.following() as feed:
                follower = FleetFollower(self._links, self.starts, self._clock, leads=False)
                standby = Standby(self._cluster, feed, follower, self._policy, self._clock)
                self.fence = await self._campaign(record, lease, standby)
                record_history(Led, self.fence.create_revision)
                _log.info("leads", extra={"fence": self.fence.create_revision})
                catch_up = partial(self._cluster.catch_up, record, lease=lease)
                await self._lead(self.fence, lease, standby, catch_up)
        finally:
            self.fence = None
            with contextlib.suppress(Unavailable):
                await resign(lease)

    async def _campaign(self, record: SchedulerRecord, lease: Lease, standby: Standby) -> Fence:
        """Stand by until elected."""
        won = asyncio.create_task(campaign(self._cluster.state, record, lease))
        standing_by = asyncio.create_task(standby.run(), name="standby")
        try:
            await asyncio.wait((won, standing_by), return_when=asyncio.FIRST_COMPLETED)
            if standing_by.done():
                standing_by.result()
            return won.result()
        finally:
            won.cancel()
            standing_by.cancel()
            await asyncio.gather(won, standing_by, return_exceptions=True)

    async def _lead(
        self,
        fence: Fence,
        lease: Lease,
        standby: Standby,
        catch_up: Callable[[], Awaitable[None]],
    ) -> None:
        """Decide until deposed; raises Conflict when a write met another leader's fence."""
        term = self._term = Term(
            self._cluster,
            fence,
            standby.feed,
            standby.follower,
            catch_up=catch_up,
            decide=self._decide,
            policy=self._policy,
            starts=self.starts,
            metrics=self._metrics,
            clock=self._clock,
            learn_every_s=self._learn_every_s,
            on_settled=self._on_settled,
        )
        tasks = (
            asyncio.create_task(wait_deposed(self._cluster.state, fence, lease)),
            asyncio.create_task(term.run()),
        )
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            _log.warning("no longer leads", extra={"fence": fence.create_revision})
        finally:
            self._term = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await term.finish()
            await self._links.stop()

    def _note_link(self) -> None:
        if self._term is not None:
            self._term.note_link()

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
