"""A stage that counts equal answers, through the doors of a whole cluster."""

from collections.abc import AsyncIterator

import httpx
import pytest

from gearfall.client import AsyncClient
from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.streaming import StreamMode
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage

pytestmark = pytest.mark.usefixtures("demo_family")

EASY, HARD = "2+3=", "123456+654321="
"""The small model always says the same of the one, and never of the other."""


@pytest.fixture
async def deployment(client: AsyncClient) -> AsyncIterator[str]:
    name = DeploymentName("arith-counted")
    counting = Stage(ModelName("arith-small"), 0.6, SelfConsistency(3))
    stored = await client.deploy(
        DeploymentRecord(name, (counting, Stage(ModelName("arith-large"))))
    )
    assert stored.stages[0] == counting
    yield name
    await client.remove_deployment(name)


async def test_equal_answers_are_given_and_others_go_up(
    client: AsyncClient, deployment: str, rest_url: str
) -> None:
    sure = await client.generate(deployment, EASY, max_tokens=8, temperature=0.0, logprobs=True)
    assert (sure.text, sure.model) == ("5", "arith-small")
    (stage,) = sure.choices[0].stages
    assert (stage.measure, stage.samples, stage.is_accepted) == ("self_consistency", 3, True)
    assert stage.agreeing >= 2
    assert stage.certainty is not None
    assert stage.certainty >= 0.6
    assert sure.choices[0].usage.total_completion_tokens > sure.choices[0].usage.completion_tokens
    assert [each.token for each in sure.choices[0].logprobs] == ["5"]

    hard = await client.generate(deployment, HARD, max_tokens=8, temperature=0.0)
    (small, large) = hard.choices[0].stages
    assert (hard.model, small.is_accepted, large.is_accepted) == ("arith-large", False, True)
    assert small.certainty is not None
    assert small.certainty < 0.6
    assert large.draft_tokens > 0
    again = await client.generate(deployment, HARD, max_tokens=8, temperature=0.0)
    assert again.text == hard.text
    alone = await client.generate("arith-large", HARD, max_tokens=8, temperature=0.0)
    assert alone.text == hard.text

    async with httpx.AsyncClient(base_url=rest_url) as rest:
        body = {"model": deployment, "prompt": EASY, "max_tokens": 8, "temperature": 0}
        said = (await rest.post("/v1/completions", json=body, timeout=60)).json()
    (told,) = said["gearfall"]["stages"]
    assert (told["samples"], told["accepted"], said["choices"][0]["text"]) == (3, True, "5")
    assert told["other_prompt_tokens"] > 0
    with pytest.raises(InvalidRequest, match="whole answers are the same"):
        await client.generate(deployment, EASY, stream_mode=StreamMode.EARLY)
