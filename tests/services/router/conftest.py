"""A router with a cascade of two models, and its REST door as clients see it."""

from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from tests.services.router.rig import Rig, running_rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running_rig() as rig:
        await rig.add_model("small", parameters=10)
        await rig.add_model("large", parameters=100)
        await rig.deploy("both", ("small", 0.5), ("large", None))
        yield rig


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    base = f"http://{rig.router.rest_address}"
    async with httpx.AsyncClient(base_url=base, timeout=10) as client:
        yield client


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[openai.AsyncOpenAI]:
    base = f"http://{rig.router.rest_address}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
        yield client
