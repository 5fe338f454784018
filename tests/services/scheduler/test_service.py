"""What a scheduler says about a model, from records that stand still."""

import contextlib
from collections.abc import AsyncIterator

import pytest

from gearfall.core.errors import NotFound
from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.ports import Fence
from gearfall.core.records import MoveRecord, PrefetchRecord, SchedulerRecord
from gearfall.core.tiers import Tier
from gearfall.infra.state.election import campaign
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from services.scheduler.loop import SchedulerLoop
from services.scheduler.service import SchedulerService
from tests.gearfall.scheduling.clusters import NODE, WORKER, demand
from tests.services.scheduler.loop_fleet import Fleet

SMALL, LARGE = ModelName("small"), ModelName("large")


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Cluster state in which nobody decides anything."""
    async with contextlib.AsyncExitStack() as stack:
        yield await Fleet(stack).open()


@pytest.fixture
def service(fleet: Fleet) -> SchedulerService:
    return fleet.service(SchedulerLoop(fleet.cluster, SchedulerPolicy()))


async def fence_of(fleet: Fleet) -> Fence:
    return await campaign(fleet.state, SchedulerRecord("other", "there:1"), fleet.lease)


async def test_a_move_is_told_of_both_models(fleet: Fleet, service: SchedulerService):
    move = MoveRecord(WORKER, SMALL, WorkerId("worker-b"), LARGE, "it is ready there", 5.0, 0.8)
    fence = await fence_of(fleet)
    await fleet.cluster.wait_seen(await fleet.cluster.put_move(move, fence=fence))
    for model in (SMALL, LARGE):
        (found,) = service.explain(model)
        assert (found.decision, found.predicted_s, found.at_unix_s) == ("moves", 0.8, 5.0)
        assert "so that large can start: it is ready there" in found.reason


async def test_wishes_and_waiting_jobs_are_told_newest_first(
    fleet: Fleet, service: SchedulerService
):
    wish = PrefetchRecord(NODE, LARGE, Tier.DRAM, "70% likely to be wanted", 6.0)
    await fleet.cluster.put_prefetch(wish, fence=await fence_of(fleet))
    waiting = demand(LARGE, jobs=3, since=7.0)
    await fleet.cluster.wait_seen(await fleet.cluster.put_demand(waiting, lease=fleet.lease))
    assert [(each.decision, each.reason) for each in service.explain(LARGE)] == [
        ("waits", "3 jobs at router router-a"),
        ("wished for in dram", wish.reason),
    ]
    assert service.explain(SMALL) == ()


async def test_what_is_not_registered_can_not_be_explained(service: SchedulerService):
    with pytest.raises(NotFound):
        service.explain(ModelName("nobody"))
