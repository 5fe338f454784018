"""Real zygote, real engine processes, a tiny real model."""

import importlib.util
import os
import signal
from typing import Any

import pytest
import pytest_asyncio
import torch

from gearfall.core.errors import CorruptCheckpoint, Unavailable
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine_link.messages import (
    CancelJob,
    EngineKind,
    FeedJob,
    FreezeJob,
    HoldJob,
    JobPhase,
    PinJob,
    ReleaseJob,
    StartEngine,
    StopEngine,
    SubmitJob,
)
from services.worker.processes.zygote_client import ExitStatus, Zygote
from tests.services.worker.tiny_checkpoints import random_model, tiny_checkpoint

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=24, temperature=1.3, top_p=0.95, top_k=40, seed=5)
PROMPTS = [[5, 9, 1], [3], list(range(1, 41)), [8] * 17, [60, 61], [2, 2, 2, 9], [44], [1, 66]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with tiny_checkpoint(random_model("llama"), tmp_path_factory.mktemp("llama")) as checkpoint:
        yield checkpoint


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygote():
    zygote = Zygote()
    await zygote.start()
    yield zygote
    await zygote.stop()
    zygote.check()


def start_message(checkpoint, **changes):
    return StartEngine(
        **{
            "model": "tiny",
            "manifest_json": checkpoint.manifest_json,
            "config_json": checkpoint.config_json,
            "generation_config_json": b"",
            "device": "cpu",
            "threads": 1,
            "slots": 8,
            "kv_tokens": 1024,
            "canary_json": checkpoint.canary_json,
        }
        | changes
    )


async def start_engine(zygote, checkpoint, **changes):
    engine = await zygote.spawn(start_message(checkpoint, **changes), checkpoint.partition_fds)
    ready = await engine.ready()
    assert ready.pid == engine.pid
    return engine


def submit(engine, name, prompt, sampling, generated=()):
    engine.send(SubmitJob(JobId(name), Epoch(1), tuple(prompt), tuple(generated), sampling))


async def collect(steps, count):
    """Read until `count` jobs have ended; return {job: (tokens, logprobs)}."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    ended = 0
    while ended < count:
        for run in (await anext(steps)).runs:
            tokens, logprobs = found.setdefault(run.job_id, ([], []))
            tokens += run.token_ids
            logprobs += run.logprobs
            ended += run.finish is not None
    return found


async def test_expected_jobs_begin_before_any_step_with_the_tokens_they_would_have_had(
    zygote, checkpoint
):
    expected = tuple(
        SubmitJob(JobId(str(number)), Epoch(1), tuple(prompt), (), sampling)
        for number, prompt in enumerate(PROMPTS)
        for sampling in ([GREEDY, SAMPLED][number % 2],)
    )
    answers = []
    for foretold in ((), expected):
        engine = await start_engine(zygote, checkpoint, expected=foretold)
        for each in expected:
            engine.send(each)
        steps = aiter(engine)
        first = await anext(steps)
        at_once = {run.job_id for run in first.runs if first.step_s == 0.0 and run.token_ids}
        assert bool(at_once) == bool(foretold)
        found = await collect(_behind(first, steps), len(PROMPTS))
        answers.append(found)
        engine.kill()
        await engine.wait_exit()
    assert answers[0] == answers[1]


async def _behind(first, steps):
    yield first
    async for step in steps:
        yield step


async def test_greedy_answers_equal_transformers(zygote, checkpoint):
    engine = await start_engine(zygote, checkpoint)
    reference = checkpoint.reference()
    for number, prompt in enumerate(PROMPTS):
        submit(engine, str(number), prompt, GREEDY)
    found = await collect(aiter(engine), len(PROMPTS))
    for number, prompt in enumerate(PROMPTS):
        own = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert found[str(number)][0] == own[0, len(prompt) :].tolist()
    engine.kill()
    await engine.wait_exit()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_jobs_together_equal_each_alone(zygote, checkpoint, sampling):
    engine = await start_engine(zygote, checkpoint)
    steps = aiter(engine)
    alone: dict[str, Any] = {}
    for number, prompt in enumerate(PROMPTS):
        submit(engine, str(number), prompt, sampling)
        alone |= await collect(steps, 1)
    for number, prompt in enumerate(PROMPTS):
        submit(engine, str(number), prompt, sampling)
    assert await collect(steps, len(PROMPTS)) == alone
    assert len({tuple(tokens) for tokens, _ in alone.values()}) == len(PROMPTS)
    engine.send(StopEngine())
    assert await engine.wait_exit() == ExitStatus(exit_code=0, signal=0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_job_of_a_killed_engine_goes_on_elsewhere(zygote, checkpoint, sampling):
    first = await start_engine(zygote, checkpoint)
    submit(first, "a", PROMPTS[2], sampling)
    whole = (await collect(aiter(first), 1))["a"]
    for cut in (0, 1, 7, 16, 23):
        engine = await start_engine(zygote, checkpoint)
        steps = aiter(engine)
        submit(engine, "a", PROMPTS[2], sampling)
        log: list[int] = []
        while len(log) < cut:
            log += (await anext(steps)).runs[0].token_ids
        os.kill(engine.pid, signal.SIGKILL)
        assert await engine.wait_exit() == ExitStatus(exit_code=0, signal=signal.SIGKILL)
        assert log == whole[0][:cut]
        submit(first, "b", PROMPTS[2], sampling, generated=log)
        assert await anext_runs(first, "b") == (whole[0][cut:], whole[1][cut:])
    first.kill()
    await first.wait_exit()


async def anext_runs(engine, name):
    found = await collect(aiter(engine), 1)
    return found[name]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_job_moves_with_its_cache_between_processes(zygote, checkpoint, sampling):
    """Bit for bit, log-probabilities too, and the target computes none of what was moved."""
    source = await start_engine(zygote, checkpoint)
    target = await start_engine(zygote, checkpoint, kv_tokens=512)
    into, out_of = aiter(target), aiter(source)
    submit(source, "a", PROMPTS[2], sampling)
    whole = (await collect(out_of, 1))["a"]
    key = (JobId("b"), Epoch(1))
    submit(source, "b", PROMPTS[2], sampling)
    source.send(PinJob(*key))
    runs = [run for _ in range(7) for run in (await anext(out_of)).runs]
    source.send(FreezeJob(*key))
    runs_after, frozen = await read_until(out_of, JobPhase.FROZEN)
    log = tuple(token for run in [*runs, *runs_after] for token in run.token_ids)
    assert len(log) == frozen.next_index
    job = SubmitJob(*key, tuple(PROMPTS[2]), log, sampling)
    target.send(HoldJob(job, by_kv=True))
    _, held = await read_until(into, JobPhase.HELD)
    for theirs, ours in zip(frozen.block_table, held.block_table, strict=True):
        target.kv_memory.write(ours, source.kv_memory.read(theirs))
    target.send(FeedJob(*key, len(log), kv_tokens=frozen.computed_tokens))
    _, fed = await read_until(into, JobPhase.HELD)
    assert fed.computed_tokens == frozen.computed_tokens == len(PROMPTS[2]) + len(log) - 1
    target.send(ReleaseJob(*key))
    assert (await collect(into, 1))["b"] == (whole[0][len(log) :], whole[1][len(log) :])
    for engine in (source, target):
        engine.kill()
        await engine.wait_exit()


async def read_until(steps, phase):
    """Read up to the report of this phase; return the runs before it, and it."""
    runs: list[Any] = []
    while True:
        step = await anext(steps)
        runs += step.runs
        for report in step.reports:
            if report.phase is phase:
                return runs, report


async def test_a_cancelled_job_says_no_more(zygote, checkpoint):
    engine = await start_engine(zygote, checkpoint)
    steps = aiter(engine)
    submit(engine, "a", [1], SamplingParams(max_tokens=250, temperature=0.0, ignore_eos=True))
    await anext(steps)
    engine.send(CancelJob(JobId("a"), Epoch(1)))
    submit(engine, "b", [2], SamplingParams(max_tokens=1, temperature=0.0))
    async for step in steps:
        if step.runs[-1].job_id == "b":
            break
    assert step.running_jobs == 0
    assert step.runs[-1].finish is FinishReason.LENGTH
    engine.kill()
    await engine.wait_exit()


async def test_iteration_ends_with_the_engine(zygote, checkpoint):
    engine = await start_engine(zygote, checkpoint)
    engine.kill()
    engine.kill()
    assert [step async for step in engine] == []
    assert str(await engine.wait_exit()) == "killed by SIGKILL"
    engine.send(StopEngine())
    engine.kill()
    with pytest.raises(ProcessLookupError):  # a zombie could still be signalled
        os.kill(engine.pid, 0)


async def test_an_engine_that_cannot_start_says_why(zygote, checkpoint):
    short = start_message(checkpoint, config_json=b"{}")
    engine = await zygote.spawn(short, checkpoint.partition_fds)
    with pytest.raises(Unavailable, match="model_type"):
        await engine.ready()
    assert await engine.wait_exit() == ExitStatus(exit_code=1, signal=0)
    torn = os.memfd_create("torn")
    os.write(torn, b"only this")
    engine = await zygote.spawn(start_message(checkpoint), [torn])
    os.close(torn)
    with pytest.raises(CorruptCheckpoint, match="partition"):
        await engine.ready()
    await engine.wait_exit()


async def test_an_engine_killed_while_it_starts_is_reported(zygote, checkpoint):
    engine = await zygote.spawn(start_message(checkpoint), checkpoint.partition_fds)
    engine.kill()
    with pytest.raises(Unavailable, match="SIGKILL"):
        await engine.ready()


async def test_a_dead_zygote_takes_its_engines_and_is_replaced(checkpoint):
    zygote = Zygote()
    await zygote.start()
    try:
        engine = await start_engine(zygote, checkpoint)
        old = zygote.pid
        assert old is not None
        os.kill(old, signal.SIGKILL)
        assert [step async for step in engine] == []
        await engine.wait_exit()
        again = await start_engine(zygote, checkpoint)
        assert zygote.pid not in {None, old}
        submit(again, "a", [5, 9, 1], GREEDY)
        assert len((await anext_runs(again, "a"))[0]) == 24
    finally:
        await zygote.stop()
    assert [step async for step in again] == []
    assert str(await again.wait_exit()) == "killed by SIGKILL"
    with pytest.raises(Unavailable, match="stopping"):
        await zygote.spawn(start_message(checkpoint), checkpoint.partition_fds)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
async def test_vllm_without_its_package_says_what_to_install(zygote, checkpoint):
    start = start_message(checkpoint, engine=EngineKind.VLLM)
    engine = await zygote.spawn(start, checkpoint.partition_fds)
    with pytest.raises(Unavailable, match=r"gearfall\[vllm\]"):
        await engine.ready()
    assert await engine.wait_exit() == ExitStatus(exit_code=1, signal=0)
