"""The router's wiring: in which order it stops."""

import asyncio

from gearfall.core.ids import ModelName
from services.router.service import RouterLimits
from tests.services.router.rig import Answer, running_rig


async def test_what_needs_a_start_gets_it_in_the_grace_of_a_router_that_stops():
    async with running_rig(limits=RouterLimits(stop_grace_s=20.0)) as rig:
        await rig.add_model("small", ready=False)
        asking = asyncio.create_task(rig.ask("small"))
        router_id, view = rig.router.router_id, lambda: rig.cluster.view
        key = (ModelName("small"), router_id)
        await rig.until(lambda: key in view().demand)
        stopping = asyncio.create_task(rig.router.stop())
        await rig.until(lambda: rig.router.service.is_stopping)
        await rig.add_model("other")  # What was deleted before is seen by now.
        assert key in view().demand
        assert router_id in view().routers
        rig.worker(small=Answer("hello"))
        assert (await asking).text() == "hello"
        await stopping
        await rig.until(lambda: router_id not in view().routers)
