"""What one leader learned is the next one's, and is written no more often than it should be."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gearfall.core.ids import ModelName
from gearfall.core.records import LearnedRecord
from gearfall.infra.cluster_view import ClusterView
from gearfall.scheduling.start_costs_json import costs_from_json
from services.scheduler.learned import STARTS, Learned
from services.scheduler.start_learning import StartLearning
from tests.gearfall.scheduling.clusters import WORKER, assignment, by_key, demand, model, replica
from tests.services.scheduler.test_loop import Fleet

SMALL = ModelName("small")
WISH = assignment(at=100.0)


def started(*totals_s: float) -> StartLearning:
    starts = StartLearning()
    for pid, total_s in enumerate(totals_s, start=1):
        starts.take(replace(replica(total_s=total_s), pid=pid), WISH, model())
    return starts


def test_something_is_written_when_it_was_learned_and_not_before_its_time():
    now, starts = [0.0], StartLearning()
    learned = Learned(starts, lambda: now[0], write_every_s=10.0)
    learned.restore(ClusterView())
    assert (learned.take(), learned.due_unix_s()) == (None, None)
    starts.take(replica(total_s=0.5), WISH, model())
    first = learned.take()
    assert first is not None
    assert costs_from_json(first.content) == starts.costs
    assert learned.take() == first, "as long as nobody says that it was written"
    learned.note_written()
    starts.take(replace(replica(total_s=0.6), pid=2), WISH, model())
    assert (learned.take(), learned.due_unix_s()) == (None, 10.0)
    now[0] = 10.0
    assert learned.take() is not None


def test_the_next_leader_learns_what_came_since_and_nothing_twice():
    earlier = Learned(started(0.5), lambda: 101.0, write_every_s=10.0)
    earlier.restore(ClusterView())
    left = earlier.take()
    assert left is not None
    known, new = replica(total_s=0.5), replace(replica("large", total_s=0.7), pid=7)
    view = ClusterView(
        learned={STARTS: left},
        assignments=by_key(WISH, assignment("large", at=100.9)),
        replicas=by_key(known, new),
    )
    starts = StartLearning()
    Learned(starts, lambda: 102.0, write_every_s=10.0).restore(view)
    starts.take(known, WISH, model())
    starts.take(new, assignment("large", at=100.9), model("large"))
    assert [outcome.model for outcome in starts.costs.outcomes] == ["small", "large"]


def test_what_is_no_such_record_is_ignored(caplog: pytest.LogCaptureFixture):
    starts = started(0.5)
    before = starts.costs
    view = ClusterView(learned={STARTS: LearnedRecord(STARTS, 0.0, '{"fixed": 1}')})
    Learned(starts, lambda: 0.0, write_every_s=10.0).restore(view)
    assert starts.costs is before
    assert "can't be read" in caplog.text


def test_a_leader_writes_again_what_a_wiped_state_lost():
    learned = Learned(started(0.5), lambda: 0.0, write_every_s=10.0)
    learned.restore(ClusterView())
    assert learned.take() is not None


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
