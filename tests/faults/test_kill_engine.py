"""kill -9 of engines and workers in mid-stream: the client's tokens equal the undisturbed run's."""

import asyncio
import random

import pytest

from gearfall.client import AsyncClient, Finished, TextDelta
from tests.cluster_host import ClusterHost, kill

pytestmark = pytest.mark.usefixtures("demo_family")

MODEL = "arith-large"
PROMPT = "31415+27182="
TOKENS = 120
KILLS = 20


async def read(
    client: AsyncClient, *, kill_at: int | None = None, pid: int = 0
) -> tuple[list[int], str, int]:
    """Return token ids, text and the number of owners; kill `pid` after token `kill_at`."""
    ids: list[int] = []
    text = ""
    epochs = 0
    async for event in client.stream(
        MODEL, PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=True
    ):
        if isinstance(event, TextDelta):
            text += event.text
            ids += [item.token_id for item in event.logprobs]
            if kill_at is not None and len(ids) >= kill_at:
                kill(pid)
                kill_at = None
        elif isinstance(event, Finished):
            epochs = event.stages[-1].epochs
    return ids, text, epochs


async def engine_pid(client: AsyncClient, gone: int = 0) -> int:
    """Return the engine's process once it is published, which may come behind its first tokens."""
    async with asyncio.timeout(20):
        while True:
            status = await client.status()
            pids = {r.pid for w in status.workers for r in w.replicas if r.model == MODEL}
            if found := pids - {0, gone}:
                return found.pop()


async def test_twenty_kills_at_random_tokens_change_nothing(client: AsyncClient) -> None:
    expected_ids, expected_text, _ = await read(client)
    assert len(expected_ids) == TOKENS
    draw = random.Random(20)
    killed = pid = 0
    for _ in range(3 * KILLS):  # on a busy machine an answer may be whole before its kill comes
        if killed == KILLS:
            break
        pid = await engine_pid(client, gone=pid)
        ids, text, epochs = await read(client, kill_at=draw.randint(1, TOKENS // 2), pid=pid)
        assert ids == expected_ids
        assert text == expected_text
        killed += epochs > 1
    assert killed == KILLS


async def test_a_killed_worker_costs_a_pause_not_a_token(
    client: AsyncClient, host: ClusterHost
) -> None:
    expected_ids, expected_text, _ = await read(client)
    ids, text, epochs = await read(client, kill_at=20, pid=host.service("worker").pid)
    assert (ids, text) == (expected_ids, expected_text)
    assert epochs > 1
