"""An interactive question is answered while batch jobs have every slot, and they lose no token."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gearfall.client import AsyncClient, TextDelta
from gearfall.client.request import Options
from gearfall.core.generation.job import Priority
from gearfall.demo import catalogue
from tests.cluster_host import ClusterHost
from tests.e2e.test_migration import wanderer

MODEL = "wanderer"
SLOTS = 2
LONG = Options(
    temperature=0.0, max_tokens=600, ignore_eos=True, logprobs=True, priority=Priority.BATCH
)
SHORT = Options(temperature=0.0, max_tokens=5, ignore_eos=True, priority=Priority.INTERACTIVE)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[AsyncClient]:
    wanderer().save_pretrained(tmp_path / "source")
    shutil.copy(catalogue.checkpoint_path("arith-small") / "tokenizer.json", tmp_path / "source")
    host = ClusterHost(tmp_path / "home", "--slots", str(SLOTS))
    async with AsyncClient(host.addresses["grpc"]) as opened:
        _ = [item async for item in opened.register_model(MODEL, str(tmp_path / "source"))]
        yield opened
    assert host.stop() == 0


class Reader:
    """A batch job that is read as it comes."""

    def __init__(self, client: AsyncClient, first_id: int) -> None:
        self.ids: list[int] = []
        self.has_begun = asyncio.Event()
        self.task = asyncio.create_task(self._read(client, [first_id, *range(3, 12)]))

    async def _read(self, client: AsyncClient, prompt: list[int]) -> None:
        async for event in client.stream(MODEL, prompt, **LONG):
            if isinstance(event, TextDelta):
                self.ids += [item.token_id for item in event.logprobs]
                self.has_begun.set()


def read_all(client: AsyncClient) -> list[Reader]:
    """Start one batch job more than there are slots."""
    return [Reader(client, 3 + number) for number in range(SLOTS + 1)]


async def test_a_question_does_not_wait_for_batch_jobs(client: AsyncClient) -> None:
    undisturbed = read_all(client)
    await asyncio.gather(*(reader.task for reader in undisturbed))
    readers = read_all(client)
    waits = {asyncio.create_task(reader.has_begun.wait()) for reader in readers}
    async with asyncio.timeout(60):
        while len(waits) > 1:
            _, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        answer = await client.generate(MODEL, [12, 4, 4], **SHORT)
    assert not any(reader.task.done() for reader in readers), "the question waited for a batch job"
    assert answer.choices[0].usage.completion_tokens == 5
    await asyncio.gather(*(reader.task for reader in readers), *waits)
    assert [reader.ids for reader in readers] == [reader.ids for reader in undisturbed]
