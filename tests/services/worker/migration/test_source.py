"""The source's end: what it can't perform leaves the job where it is."""

import pytest

from gearfall.core.errors import Unavailable
from gearfall.infra.failpoints import arm_failpoints
from services.worker.migration.source_table import SourceState
from tests.services.worker.migration.migration_world import World


@pytest.fixture(autouse=True)
def disarmed():
    yield
    arm_failpoints("worker", {})


@pytest.mark.parametrize("by_kv", [False, True])
@pytest.mark.parametrize("point", ["bulk", "freeze", "commit"])
async def test_a_step_that_fails_leaves_the_job_at_its_source(point, by_kv):
    world = World(prompt_tokens=40, max_tokens=60)
    await world.start()
    await world.run(steps=6)
    arm_failpoints("worker", {"GEARFALL_FAILPOINTS": f"source.{point}=fail@1"})
    assert world.migrate(by_kv=by_kv)
    await world.heal()
    (call,) = world.calls
    assert call.error
    assert point in call.error
    assert call.source.source.state is SourceState.ENDED
    assert world.client.owners == [("a", 1)]
    await world.stop()


async def test_a_migration_that_may_not_begin_leaves_the_job_free_for_the_next():
    world = World(prompt_tokens=40, max_tokens=60)
    await world.start()
    await world.run(steps=6)
    arm_failpoints("worker", {"GEARFALL_FAILPOINTS": "source.prepare=fail@1"})
    with pytest.raises(Unavailable):
        world.migrate(by_kv=False)
    assert world.migrate(by_kv=False)
    await world.heal()
    assert world.client.owners == [("a", 1), ("b", 2)]
    await world.stop()
