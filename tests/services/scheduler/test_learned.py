"""What one leader learned is the next one's, and is written no more often than it should be."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gearfall.core.ids import ModelName, RouterId
from gearfall.core.ports import Fence
from gearfall.core.records import LearnedRecord, LoadRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.infra.state.memory_state import MemoryState
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.estimates.start_costs_json import costs_from_json, costs_to_json
from gearfall.scheduling.reconcile import decide
from services.scheduler.learned import (
    ARRIVALS,
    STARTS,
    Keeper,
    restore_starts,
    restored_arrivals,
)
from services.scheduler.start_learning import StartLearning
from tests.gearfall.scheduling.clusters import WORKER, assignment, by_key, demand, model, replica
from tests.services.scheduler.loop_fleet import Fleet

SMALL = ModelName("small")
WISH = assignment(at=100.0)


def started(*totals_s: float) -> StartLearning:
    starts = StartLearning()
    for pid, total_s in enumerate(totals_s, start=1):
        starts.take(replace(replica(total_s=total_s), pid=pid), WISH, model())
    return starts


def keeper(starts: StartLearning, now: list[float]) -> Keeper[StartCosts]:
    return Keeper(
        STARTS,
        lambda: starts.costs,
        costs_to_json,
        clock=lambda: now[0],
        write_every_s=10.0,
        empty=StartCosts(),
    )


def test_something_is_written_when_it_was_learned_and_not_before_its_time():
    now, starts = [0.0], StartLearning()
    kept = keeper(starts, now)
    assert (kept.take(), kept.due_unix_s()) == (None, None)
    starts.take(replica(total_s=0.5), WISH, model())
    first = kept.take()
    assert first is not None
    assert costs_from_json(first.content) == starts.costs
    assert kept.take() == first, "as long as nobody says that it was written"
    kept.note_written()
    starts.take(replace(replica(total_s=0.6), pid=2), WISH, model())
    assert (kept.take(), kept.due_unix_s()) == (None, 10.0)
    now[0] = 10.0
    assert kept.take() is not None


def test_the_next_leader_learns_what_came_since_and_nothing_twice():
    left = keeper(started(0.5), [101.0]).take()
    assert left is not None
    known, new = replica(total_s=0.5), replace(replica("large", total_s=0.7), pid=7)
    view = ClusterView(
        learned={STARTS: left},
        assignments=by_key(WISH, assignment("large", at=100.9)),
        replicas=by_key(known, new),
    )
    starts = StartLearning()
    assert restore_starts(view, starts)
    kept = keeper(starts, [102.0])
    kept.note_known()
    assert kept.due_unix_s() is None
    starts.take(known, WISH, model())
    starts.take(new, assignment("large", at=100.9), model("large"))
    assert [outcome.model for outcome in starts.costs.outcomes] == ["small", "large"]
    assert kept.due_unix_s() == 112.0


def test_what_is_no_such_record_is_ignored(caplog: pytest.LogCaptureFixture):
    starts = started(0.5)
    before = starts.costs
    bad = {name: LearnedRecord(name, 0.0, '{"fixed": 1}') for name in (STARTS, ARRIVALS)}
    view = ClusterView(learned=bad)
    assert not restore_starts(view, starts)
    assert restored_arrivals(view) == {}
    assert starts.costs is before
    assert caplog.text.count("can't be read") == 2


def test_a_leader_writes_again_what_a_wiped_state_lost():
    starts = started(0.5)
    assert not restore_starts(ClusterView(), starts)
    assert keeper(starts, [0.0]).take() is not None


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        yield await Fleet(stack).open()


async def test_a_new_leader_goes_on_with_the_old_ones_costs(fleet: Fleet):
    first = await fleet.scheduler("s1")
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, SMALL) in v.assignments)
    fleet.now += 1.0
    await fleet.cluster.put_replica(replica(total_s=0.5), lease=fleet.lease)
    await fleet.until(lambda v: STARTS in v.learned)
    await first.stop()
    second = await fleet.scheduler("s2")
    await fleet.cluster.put_demand(demand("large"), lease=fleet.lease)
    await fleet.until(lambda v: (WORKER, "large") in v.assignments)
    assert second.starts.costs == first.starts.costs
    assert len(second.starts.costs.outcomes) == 1


def _last(view: ClusterView, name: ModelName) -> float | None:
    """When the newest arrivals of a model came that a leader has written down."""
    arrivals = restored_arrivals(view).get(name)
    return arrivals.last_unix_s if arrivals else None


async def test_a_new_leader_knows_when_jobs_came(fleet: Fleet):
    first = await fleet.scheduler("s1")
    await fleet.until(lambda v: v.leader is not None)
    for jobs in (1, 9):
        load = LoadRecord(SMALL, RouterId("r"), fleet.now, jobs, jobs, jobs, 0)
        await fleet.cluster.wait_seen(await fleet.cluster.put_load(load, lease=fleet.lease))
        # A decision that is written later has seen it.
        await fleet.cluster.put_demand(demand(("small", "large")[jobs == 9]), lease=fleet.lease)
        await fleet.until(lambda v, count=jobs: len(v.decisions) == 1 + (count == 9))
        fleet.now += 60.0
    came_unix_s = fleet.now - 60.0
    await fleet.cluster.put_model(model("third"))
    view = await fleet.until(lambda v: ARRIVALS in v.learned and _last(v, SMALL) == came_unix_s)
    known = restored_arrivals(view)[SMALL]
    await first.stop()
    second = await fleet.scheduler("s2")
    await fleet.until(lambda v: v.leader is not None and v.leader.scheduler_id == "s2")
    await fleet.cluster.put_demand(demand("third"), lease=fleet.lease)
    await fleet.until(lambda v: "third" in v.decisions)
    assert second._term is not None
    assert second._term._follower.arrivals[SMALL] == known


class SlowToKeep(Cluster):
    """Cluster state that takes what was learned when a test lets it."""

    def __init__(self, state: MemoryState) -> None:
        super().__init__(state)
        self.is_asked, self.let_go = asyncio.Event(), asyncio.Event()

    async def put_learned(self, record: LearnedRecord, *, fence: Fence) -> int:
        self.is_asked.set()
        await self.let_go.wait()
        return await super().put_learned(record, fence=fence)


async def test_what_is_learned_while_a_record_is_on_its_way_is_written_though_nothing_changes(
    fleet: Fleet,
):
    knows_both = asyncio.Event()

    def telling_decide(fleet_now, costs, policy, now_unix_s):
        if {name for name, *_ in costs.fixed} == {"small", "large"}:
            knows_both.set()
        return decide(fleet_now, costs, policy, now_unix_s)

    cluster = SlowToKeep(MemoryState(fleet.server))
    await fleet.scheduler(decide=telling_decide, cluster=cluster, learn_every_s=0.0)
    async with asyncio.timeout(10):
        await fleet.cluster.put_replica(replica(total_s=0.5), lease=fleet.lease)
        await cluster.is_asked.wait()
        await fleet.cluster.put_replica(replica("large", total_s=0.7), lease=fleet.lease)
        await knows_both.wait()
    cluster.let_go.set()
    await fleet.until(lambda v: STARTS in v.learned and "large" in v.learned[STARTS].content)
