"""A worker for each test that asks for one."""

from contextlib import AsyncExitStack

import pytest

from tests.services.worker.worker_site import Site


@pytest.fixture
async def site():
    async with AsyncExitStack() as stack:
        yield await Site(stack).open()
