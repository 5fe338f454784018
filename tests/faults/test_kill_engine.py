"""kill -9 of engines and workers in mid-stream: the client's tokens equal the undisturbed run's."""

import random

import pytest

from gearfall.client import AsyncClient, Finished, TextDelta
from tests.cluster_host import ClusterHost

pytestmark = pytest.mark.usefixtures("demo_family")

MODEL = "arith-large"
PROMPT = "31415+27182="
TOKENS = 120
KILLS = 20
FIRST_STEP = 4
"""Decode steps that come before it may be rehearsals of the next engine."""


async def read(client: AsyncClient) -> tuple[list[int], str, int]:
    """Return token ids, text and the number of owners."""
    ids: list[int] = []
    text = ""
    epochs = 0
    async for event in client.stream(
        MODEL, PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=True
    ):
        if isinstance(event, TextDelta):
            text += event.text
            ids += [item.token_id for item in event.logprobs]
        elif isinstance(event, Finished):
            epochs = event.stages[-1].epochs
    return ids, text, epochs


async def test_twenty_kills_at_random_tokens_change_nothing(
    client: AsyncClient, host: ClusterHost
) -> None:
    host.arm()
    expected_ids, expected_text, _ = await read(client)
    assert len(expected_ids) == TOKENS
    draw = random.Random(20)
    for _ in range(KILLS):
        host.arm(f"engine.decode=kill@{draw.randint(FIRST_STEP, TOKENS // 2)}")
        ids, text, epochs = await read(client)
        assert (ids, text) == (expected_ids, expected_text)
        assert epochs > 1


async def test_a_killed_worker_costs_a_pause_not_a_token(
    client: AsyncClient, host: ClusterHost
) -> None:
    host.arm()
    expected_ids, expected_text, _ = await read(client)
    host.arm(f"worker.push[model={MODEL}]=kill@20")
    ids, text, epochs = await read(client)
    assert (ids, text) == (expected_ids, expected_text)
    assert epochs > 1
