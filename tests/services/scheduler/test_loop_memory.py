"""What stays in memory of the terms that a scheduler has led."""

import asyncio
import contextlib
import gc
import weakref

import pytest

from gearfall.infra.state.memory_state import MemoryStateServer
from gearfall.scheduling.reconcile import decide
from services.scheduler.main import let_go
from tests.services.scheduler.loop_fleet import Fleet


@pytest.fixture
def frozen():
    """What a test freezes is let go behind it."""
    yield
    gc.unfreeze()


async def settled_terms(server: MemoryStateServer, heard: asyncio.Queue[str], terms: int) -> None:
    """Return in the last of so many terms, once it has decided."""
    async with asyncio.timeout(10):
        for left in reversed(range(terms)):
            while await heard.get() != "settled":
                pass
            if left:
                server.delete("leader")


async def test_no_fleet_of_an_earlier_term_stays(frozen):
    heard: asyncio.Queue[str] = asyncio.Queue()
    fleets: weakref.WeakSet[object] = weakref.WeakSet()

    def noted(fleet, *arguments):
        fleets.add(fleet)
        return decide(fleet, *arguments)

    def settle():
        gc.freeze()
        heard.put_nowait("settled")

    async with contextlib.AsyncExitStack() as stack:
        fleet = await Fleet(stack).open()
        await fleet.scheduler(decide=noted, on_settled=settle, on_left=let_go)
        await settled_terms(fleet.server, heard, terms=3)
        assert len(fleets) == 1
