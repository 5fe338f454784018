"""The engine that answers at once keeps to what a real engine promises its worker."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from bench.front_door.instant_engine import InstantEngine, InstantSpawner
from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine_link.messages import (
    CancelJob,
    StartEngine,
    StepDone,
    StopEngine,
    SubmitJob,
)
from services.worker.ports import EngineProcess, EngineSpawner

TOKEN_ID = 8


def submit(job: str, *, max_tokens: int = 3, log: tuple[int, ...] = ()) -> SubmitJob:
    return SubmitJob(
        job_id=JobId(job),
        epoch=Epoch(1),
        prompt_token_ids=(1, 5),
        generated_token_ids=log,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
    )


@pytest.fixture
async def engine() -> InstantEngine:
    start = StartEngine(
        model="m",
        manifest_json=b"",
        config_json=b"",
        generation_config_json=b"",
        device="cpu",
        threads=1,
        slots=4,
        kv_tokens=64,
    )
    spawner: EngineSpawner = InstantSpawner(TOKEN_ID)
    spawned: EngineProcess = await spawner.spawn(start, ())
    assert isinstance(spawned, InstantEngine)
    assert (await spawned.ready()).pid == spawned.pid
    return spawned


async def take(steps: AsyncIterator[StepDone], count: int) -> list[TokenRun]:
    async with asyncio.timeout(5):
        return [run for _ in range(count) for run in (await anext(steps)).runs]


async def test_each_step_gives_one_token_of_every_running_job(engine: InstantEngine) -> None:
    engine.send(submit("a", max_tokens=2))
    engine.send(submit("b", max_tokens=3))
    runs = await take(aiter(engine), 3)
    said = [(run.job_id, run.index, run.finish) for run in runs]
    assert said == [
        ("a", 0, None),
        ("b", 0, None),
        ("a", 1, FinishReason.LENGTH),
        ("b", 1, None),
        ("b", 2, FinishReason.LENGTH),
    ]
    for run in runs:
        assert run.token_ids == (TOKEN_ID,)
        assert len(run.logprobs) == len(run.margins) == 1


async def test_tokens_of_a_whole_answer_come_together(engine: InstantEngine) -> None:
    engine.send(msgspec.structs.replace(submit("a"), gather_s=60.0))
    (run,) = await take(aiter(engine), 1)
    assert (run.index, run.token_ids) == (0, (TOKEN_ID,) * 3)
    assert run.finish is FinishReason.LENGTH


async def test_a_resumed_job_goes_on_behind_its_log(engine: InstantEngine) -> None:
    engine.send(submit("a", log=(TOKEN_ID,)))
    runs = await take(aiter(engine), 2)
    assert [(run.index, run.finish) for run in runs] == [(1, None), (2, FinishReason.LENGTH)]


async def test_a_cancelled_job_says_nothing_more(engine: InstantEngine) -> None:
    steps = aiter(engine)
    engine.send(submit("a"))
    engine.send(submit("b"))
    await take(steps, 1)
    engine.send(CancelJob(JobId("a"), Epoch(1)))
    assert [run.job_id for run in await take(steps, 2)] == ["b", "b"]


async def test_a_second_submission_changes_nothing(engine: InstantEngine) -> None:
    steps = aiter(engine)
    engine.send(submit("a"))
    await take(steps, 1)
    engine.send(submit("a"))
    assert [run.index for run in await take(steps, 2)] == [1, 2]


async def test_it_wakes_for_a_job_that_comes_later(engine: InstantEngine) -> None:
    steps = aiter(engine)
    waiting = asyncio.ensure_future(anext(steps))
    await asyncio.sleep(0)
    engine.send(submit("a"))
    async with asyncio.timeout(5):
        assert [run.job_id for run in (await waiting).runs] == ["a"]


@pytest.mark.parametrize("is_killed", [True, False])
async def test_its_steps_end_with_it(engine: InstantEngine, is_killed: bool) -> None:
    collecting = asyncio.ensure_future(_collect(engine))
    await asyncio.sleep(0)
    if is_killed:
        engine.kill()
    else:
        engine.send(StopEngine())
    async with asyncio.timeout(5):
        await engine.wait_exit()
        assert await collecting == []


async def _collect(engine: InstantEngine) -> list[StepDone]:
    return [step async for step in engine]
