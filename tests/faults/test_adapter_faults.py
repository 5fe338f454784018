"""Engines and stores killed, adapters removed, while an answer runs with an adapter."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gearfall.client import AsyncClient, TextDelta
from gearfall.core.errors import Conflict, NotFound
from gearfall.demo import catalogue
from tests.cluster_host import ClusterHost, kill
from tests.e2e.test_migration import PROMPT_IDS, wanderer
from tests.services.worker.tiny_adapters import save_adapter

BASE, ADAPTERS = "faulty-base", ("faulty-1", "faulty-2")
TOKENS = 300
LONG = 900
"""So many that the answer is still running when the next call arrives."""
Disturb = Callable[[], Awaitable[None]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters, slow enough to be met in mid-answer."""
    home = tmp_path_factory.mktemp("adapters")
    wanderer().save_pretrained(home / BASE)
    shutil.copy(catalogue.checkpoint_path("arith-small") / "tokenizer.json", home / BASE)
    for seed, name in enumerate(ADAPTERS):
        targets = ("q_proj", "down_proj")
        save_adapter(wanderer(), targets, home / name, seed=seed, size=0.05)
    return home


@pytest.fixture
async def adapted(client: AsyncClient, sources: Path) -> AsyncClient:
    for name in (BASE, *ADAPTERS):
        base = "" if name == BASE else BASE
        _ = [item async for item in client.register_model(name, str(sources / name), base=base)]
    return client


async def read(
    client: AsyncClient, model: str, disturb: Disturb | None = None, *, tokens: int = TOKENS
) -> list[int]:
    """Return an answer's token ids; `disturb` after the first of them."""
    ids: list[int] = []
    async for event in client.stream(
        model, PROMPT_IDS, temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=True
    ):
        if isinstance(event, TextDelta):
            ids += [item.token_id for item in event.logprobs]
            if disturb is not None:
                await disturb()
                disturb = None
    assert disturb is None
    assert len(ids) == tokens
    return ids


async def test_a_killed_engine_gets_the_adapter_again(adapted: AsyncClient) -> None:
    expected = await read(adapted, ADAPTERS[0])
    assert expected != await read(adapted, BASE)

    async def kill_engine() -> None:
        workers = (await adapted.status()).workers
        kill(next(r.pid for worker in workers for r in worker.replicas if r.model == BASE))

    assert await read(adapted, ADAPTERS[0], kill_engine) == expected


async def test_a_killed_store_costs_a_running_answer_nothing(
    adapted: AsyncClient, host: ClusterHost
) -> None:
    expected = await read(adapted, ADAPTERS[0])

    async def kill_store() -> None:
        kill(host.service("store").pid)

    answers = await asyncio.gather(
        read(adapted, ADAPTERS[0], kill_store), read(adapted, ADAPTERS[1]), read(adapted, BASE)
    )
    assert answers[0] == expected
    assert await read(adapted, ADAPTERS[1]) == answers[1]
    assert await read(adapted, BASE) == answers[2]


async def test_an_adapter_is_not_removed_under_an_answer(adapted: AsyncClient) -> None:
    expected = await read(adapted, ADAPTERS[0], tokens=LONG)

    async def remove() -> None:
        with pytest.raises(Conflict, match="requests are running"):
            await adapted.remove_model(ADAPTERS[0])

    assert await read(adapted, ADAPTERS[0], remove, tokens=LONG) == expected
    await adapted.remove_model(ADAPTERS[0])
    with pytest.raises(NotFound):
        await read(adapted, ADAPTERS[0])
