"""Which settings a scheduler takes, and that a broken loop ends it."""

import asyncio

import pytest

from gearfall.core.errors import Internal
from gearfall.core.records import SchedulerRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState
from gearfall.scheduling.policies import PlacementPolicy
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from services.scheduler.loop import SchedulerLoop
from services.scheduler.main import parse_settings, until_stopped


@pytest.mark.parametrize("policy", ["ours", "random", "least-loaded", "locality"])
def test_a_policy_is_chosen_by_name(policy: str):
    assert parse_settings(["--policy", policy]).policy is PlacementPolicy(policy)


@pytest.mark.parametrize("policy", ["preempt", "", "Ours"])
def test_a_policy_that_no_real_worker_follows_is_refused(policy: str):
    with pytest.raises(SystemExit):
        parse_settings(["--policy", policy])


async def test_a_scheduler_whose_loop_broke_does_not_go_on_as_if_it_led():
    class Breaking(MemoryState):
        async def grant_lease(self, ttl_s: float):
            raise Internal(f"a defect in a lease of {ttl_s:g} s")

    state = Breaking()
    cluster = Cluster(state)
    await cluster.start()
    loop = SchedulerLoop(cluster, SchedulerPolicy())
    loop.start(SchedulerRecord("s1", "here:1"))
    with pytest.raises(Internal, match="a defect"):
        await asyncio.wait_for(until_stopped(asyncio.Event(), loop), 10)
    await loop.stop()
    await cluster.stop()
    await state.close()


def test_fetching_ahead_is_on_unless_it_is_turned_off():
    assert parse_settings([]).prefetch is True
    assert parse_settings(["--prefetch", "off"]).prefetch is False
    with pytest.raises(SystemExit):
        parse_settings(["--prefetch", "perhaps"])
