"""One term of leadership: decide whenever something changed or is due, write it, look again.

One decision at a time: the next is made from a fleet that holds what the last one wrote, or has on
its way. Only what nothing that stands depends on is left on its way: starts and wishes.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from gearfall.core.errors import Unavailable
from gearfall.core.ports import Fence
from gearfall.infra.state.change_feed import ChangeFeed
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.scheduling.actions import Action
from gearfall.scheduling.baselines.baseline import DecideStep
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.estimates.start_costs_json import costs_to_json
from gearfall.scheduling.prefetching.arrivals_json import arrivals_to_json
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from services.scheduler.action_writer import ActionWriter
from services.scheduler.fleet_follower import FleetFollower
from services.scheduler.learned import (
    ARRIVALS,
    ARRIVALS_EVERY,
    STARTS,
    Keeper,
    restore_starts,
    restored_arrivals,
)
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.start_learning import StartLearning
from services.scheduler.write_order import parted

MOST_BEHIND = 16
"""Decisions on their way beyond which the next one waits."""
TURNS_TO_STATE = 5
"""Of the event loop, from a decision to its first write's being on its way."""
RETRY_S = 0.5
"""Pause before a decision is made again whose writes did not get through."""

_log = logging.getLogger(__name__)


class Term:
    """Leads under one fence until it is cancelled or a write meets another leader's."""

    def __init__(
        self,
        cluster: Cluster,
        fence: Fence,
        feed: ChangeFeed,
        follower: FleetFollower,
        *,
        catch_up: Callable[[], Awaitable[None]],
        decide: DecideStep,
        policy: SchedulerPolicy,
        starts: StartLearning,
        metrics: SchedulerMetrics,
        clock: Callable[[], float],
        learn_every_s: float,
        on_settled: Callable[[], None],
    ) -> None:
        """`catch_up` returns when the cluster's view includes all that was written before."""
        self._cluster = cluster
        self._catch_up = catch_up
        self._decide_step = decide
        self._policy = policy
        self._starts = starts
        self._metrics = metrics
        self._clock = clock
        self._on_settled = on_settled
        self._feed = feed
        self._follower = follower
        self._kept_starts = Keeper(
            STARTS,
            lambda: starts.costs,
            costs_to_json,
            clock=clock,
            write_every_s=learn_every_s,
            empty=StartCosts(),
        )
        self._kept_arrivals = Keeper(
            ARRIVALS,
            lambda: self._follower.arrivals,
            arrivals_to_json,
            clock=clock,
            write_every_s=ARRIVALS_EVERY * learn_every_s,
            version=lambda: self._follower.load_changes,
            empty=0,
        )
        self._writer = ActionWriter(
            cluster,
            fence,
            on_decision=lambda made: metrics.count_decision(made.decision),
            on_failed=self._wake,
        )

    async def run(self) -> None:
        """Decide for ever. Raises Conflict when a write met another leader's fence."""
        await self._catch_up()
        self._restore(self._cluster.view)
        self._follower.lead()
        self._follower.take_in(self._feed.take())
        decision_due_unix_s = await self._decide()
        self._on_settled()
        while True:
            due_unix_s = _earliest(decision_due_unix_s, *self._learned_due_unix_s())
            await self._wait_changed_or(due_unix_s)
            self._cluster.check_follows()
            is_due = due_unix_s is not None and due_unix_s <= self._clock()
            if self._follower.take_in(self._feed.take()) or is_due or self._writer.has_failed:
                decision_due_unix_s = await self._decide()

    def _learned_due_unix_s(self) -> tuple[float | None, ...]:
        return tuple(keeper.due_unix_s() for keeper in (self._kept_starts, self._kept_arrivals))

    def _restore(self, view: ClusterView) -> None:
        if restore_starts(view, self._starts):
            self._kept_starts.note_known()
        self._follower.restore_arrivals(restored_arrivals(view))

    async def finish(self) -> None:
        """Return when no write of this term is under way any more."""
        await self._writer.finish()

    def note_link(self) -> None:
        """A worker came into reach or went out of it."""
        self._follower.note_link()
        self._wake()

    def _wake(self) -> None:
        self._feed.wake()

    async def _wait_changed_or(self, due_unix_s: float | None) -> None:
        delay_s = None if due_unix_s is None else max(0.0, due_unix_s - self._clock())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._feed.wait()

    async def _decide(self) -> float | None:
        """Make and write one decision; return when the next is due though nothing changes."""
        try:
            return await self._write_next()
        except Unavailable as error:
            _log.warning("decision not written", extra={"error": error.message})
            await self._begin_anew()
            return None

    async def _begin_anew(self) -> None:
        """Go on from what really stands: the fleet counts what was decided as looked at.

        A write that was not answered may have been taken, so one comes first that is behind it.
        """
        with contextlib.suppress(Unavailable):
            await self._writer.settled()
        self._follower.expect_nothing()
        for keeper in (self._kept_starts, self._kept_arrivals):
            keeper.note_lost()
        while True:
            await asyncio.sleep(RETRY_S)
            try:
                await self._catch_up()
            except Unavailable as error:
                _log.info("cluster state can't be read", extra={"error": error.message})
                continue
            self._feed.restart(self._cluster.view)
            return

    async def _write_next(self) -> float | None:
        self._writer.raise_failed()
        if adoptions := self._follower.adoptions():
            await self._write(adoptions)
            return self._clock()
        began_s = time.perf_counter()
        plan = self._decide_step(
            self._follower.fleet, self._starts.costs, self._policy, self._clock()
        )
        self._metrics.observe_placement(time.perf_counter() - began_s)
        steps, _ = parted(plan.actions)
        if self._follower.may_expect(steps):
            self._writer.write_behind(plan.actions, self._follower.expect(steps))
            await self._let_out(steps)
        else:
            await self._write(plan.actions)
        if self._writer.behind >= MOST_BEHIND:
            await self._writer.settled()
        for keeper in (self._kept_starts, self._kept_arrivals):
            if (learned := keeper.take()) is not None:
                keeper.note_sent()
                self._writer.write_learned_behind(learned, partial(self._note_kept, keeper))
        return _earliest(plan.next_due_unix_s, self._follower.adoption_due_unix_s())

    async def _let_out(self, steps: Sequence[Action]) -> None:
        """Return when a decision's first writes are on their way.

        The loop would make the next decision first, for which somebody has come meanwhile.
        """
        for _ in range(TURNS_TO_STATE if steps else 0):
            await asyncio.sleep(0)

    def _note_kept(self, keeper: Keeper[Any]) -> None:
        """A record was written: what was learned since is due in its turn."""
        keeper.note_written()
        self._wake()

    async def _write(self, actions: Sequence[Action]) -> None:
        """Write what comes behind all that is on its way, and return when it is seen."""
        await self._writer.settled()
        await self._cluster.wait_seen(await self._writer.write_all(actions))


def _earliest(*dues_unix_s: float | None) -> float | None:
    return min(filter(None, dues_unix_s), default=None)
