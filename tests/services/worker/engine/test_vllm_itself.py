"""vLLM itself behind the worker's port, through a real zygote, on a GPU or vLLM's CPU backend.

The double of the other tests behaves as what is seen here. docs/protocol.md says how to run these.
"""

import asyncio
import importlib.util
import os
import select
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager

import pytest
import pytest_asyncio
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.ids import JobId
from services.worker.engine_link.messages import (
    CancelJob,
    EngineKind,
    FeedJob,
    FreezeJob,
    HoldJob,
    JobPhase,
    JobReport,
    ReleaseJob,
    StartEngine,
    ThawJob,
    WorkerMessage,
)
from services.worker.processes.zygote_client import EngineProcess, Zygote
from tests.services.worker.engine.vllm_processes import descendants, name_of
from tests.services.worker.engine.vllm_submissions import EPOCH, PROMPT, submit
from tests.services.worker.tiny_checkpoints import TinyCheckpoint, tiny_checkpoint

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed: docs/protocol.md says how to run these",
    ),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(400),
]

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
KINDS = ("LlamaConfig", "Qwen2Config")
VOCABULARY = 19
CONTEXT_TOKENS = 4096
WAIT_S = 60.0


def wandering(kind: str) -> PreTrainedModel:
    """A seeded float32 model of a head size that vLLM's kernels know; its answers wander."""
    config = getattr(transformers, kind)(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    made: PreTrainedModel = model.eval()
    return made


class Served:
    """An engine and what it said."""

    def __init__(self, engine: EngineProcess) -> None:
        self.engine = engine
        self._steps = aiter(engine)
        self.runs: dict[str, list[TokenRun]] = {}
        self.reports: list[JobReport] = []

    def send(self, *messages: WorkerMessage) -> None:
        for message in messages:
            self.engine.send(message)

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                step = await anext(self._steps)
                for run in step.runs:
                    self.runs.setdefault(run.job_id, []).append(run)
                self.reports += step.reports

    async def ended(self, *jobs: str) -> list[TokenRun]:
        """Return the last run of each job."""

        def finals() -> list[TokenRun]:
            return [run for job in jobs for run in self.runs.get(job, ()) if run.finish]

        await self.until(lambda: len(finals()) == len(jobs))
        return finals()

    async def reported(self, job: str, phase: JobPhase) -> JobReport:
        def find() -> list[JobReport]:
            return [each for each in self.reports if (each.job_id, each.phase) == (job, phase)]

        await self.until(find)
        return find()[-1]

    def tokens(self, job: str) -> list[int]:
        return [token for run in self.runs.get(job, ()) for token in run.token_ids]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygote() -> AsyncIterator[Zygote]:
    zygote = Zygote()
    await zygote.start()
    yield zygote
    await zygote.stop()
    zygote.check()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TinyCheckpoint]]:
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(
                tiny_checkpoint(wandering(kind), tmp_path_factory.mktemp(kind))
            )
            for kind in KINDS
        }


@asynccontextmanager
async def serving(
    zygote: Zygote, checkpoint: TinyCheckpoint, kind: EngineKind, *, slots: int = 4
) -> AsyncIterator[Served]:
    start = StartEngine(
        model="wandering", manifest_json=checkpoint.manifest_json,
        config_json=checkpoint.config_json, generation_config_json=b"", device=DEVICE, threads=1,
        slots=slots, kv_tokens=2 * CONTEXT_TOKENS, canary_json=checkpoint.canary_json, engine=kind,
    )  # fmt: skip
    engine = await zygote.spawn(start, checkpoint.partition_fds)
    try:
        await engine.ready()
        yield Served(engine)
    finally:
        engine.kill()
        await engine.wait_exit()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama(zygote: Zygote, checkpoints: dict[str, TinyCheckpoint]) -> AsyncIterator[Served]:
    async with serving(zygote, checkpoints["LlamaConfig"], EngineKind.VLLM) as served:
        yield served


def rows(checkpoint: TinyCheckpoint, tokens: list[int]) -> torch.Tensor:
    """transformers' log-probabilities behind every token, in float32."""
    with torch.no_grad():
        logits: torch.Tensor = checkpoint.reference()(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


async def test_greedy_tokens_and_top_logprobs_are_transformers(
    llama: Served, checkpoints: dict[str, TinyCheckpoint]
) -> None:
    llama.send(submit("top", tokens=40, sampling={"top_logprobs": 5}))
    await llama.ended("top")
    runs = llama.runs["top"]
    tokens = llama.tokens("top")
    expected = rows(checkpoints["LlamaConfig"], [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    assert expected.argmax(-1).tolist() == tokens
    top = expected.topk(5)
    for run, ids, values in zip(runs, top.indices.tolist(), top.values.tolist(), strict=True):
        (alternatives,) = run.alternatives
        assert [each.token_id for each in alternatives] == ids
        assert [each.logprob for each in alternatives] == pytest.approx(values, abs=1e-3)
        assert run.logprobs[0] == pytest.approx(values[0], abs=1e-3)
        assert run.margins[0] == pytest.approx(values[0] - values[1], abs=2e-3)


async def test_a_qwen2_answers_as_transformers_does(
    zygote: Zygote, checkpoints: dict[str, TinyCheckpoint]
) -> None:
    checkpoint = checkpoints["Qwen2Config"]
    async with serving(zygote, checkpoint, EngineKind.VLLM) as served:
        served.send(submit("a", tokens=40))
        await served.ended("a")
        tokens = served.tokens("a")
    expected = rows(checkpoint, [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    assert expected.argmax(-1).tolist() == tokens


async def test_a_stop_token_is_the_answers_last(llama: Served) -> None:
    llama.send(submit("whole", tokens=30))
    await llama.ended("whole")
    whole = llama.tokens("whole")
    stop = next(token for token in whole[5:] if token not in whole[:5])
    until = whole[: whole.index(stop) + 1]
    stopped = {"stop_token_ids": (stop,)}
    llama.send(
        submit("stop", tokens=30, sampling=stopped),
        submit("deaf", tokens=30, sampling=stopped | {"ignore_eos": True}),
    )
    ends = {run.job_id: run.finish for run in await llama.ended("stop", "deaf")}
    assert ends == {"stop": FinishReason.STOP, "deaf": FinishReason.LENGTH}
    assert llama.tokens("stop") == until
    assert llama.tokens("deaf") == whole


async def test_a_seed_names_an_answer(llama: Served) -> None:
    def sampled(name: str, seed: int) -> WorkerMessage:
        return submit(name, tokens=40, sampling={"temperature": 1.0, "top_k": 10, "seed": seed})

    llama.send(sampled("first", 5), sampled("again", 5), sampled("other", 6))
    await llama.ended("first", "again", "other")
    assert llama.tokens("first") == llama.tokens("again")
    assert llama.tokens("first") != llama.tokens("other")


async def test_all_of_a_small_vocabulary_can_be_asked_for(llama: Served) -> None:
    llama.send(submit("twenty", tokens=4, sampling={"top_logprobs": 20}))
    await llama.ended("twenty")
    assert all(len(run.alternatives[0]) == VOCABULARY < 20 for run in llama.runs["twenty"])


async def test_the_whole_context_is_had_by_every_slot_in_turn(llama: Served) -> None:
    prompt = tuple(3 + place % 16 for place in range(CONTEXT_TOKENS - 40))
    jobs = [submit(f"long-{number}", tokens=100, prompt=prompt) for number in range(3)]
    llama.send(*jobs)
    ends = await llama.ended(*(job.job_id for job in jobs))
    assert [run.finish for run in ends] == [FinishReason.LENGTH] * 3
    assert [len(llama.tokens(job.job_id)) for job in jobs] == [40] * 3


async def test_a_cancelled_job_leaves_its_slot_at_once(
    zygote: Zygote, checkpoints: dict[str, TinyCheckpoint]
) -> None:
    async with serving(zygote, checkpoints["LlamaConfig"], EngineKind.VLLM, slots=1) as served:
        served.send(submit("endless", tokens=CONTEXT_TOKENS))
        await served.until(lambda: len(served.tokens("endless")) >= 3)
        served.send(CancelJob(JobId("endless"), EPOCH), submit("next", tokens=5))
        await served.ended("next")
        assert len(served.tokens("next")) == 5
        assert len(served.tokens("endless")) < CONTEXT_TOKENS // 4


async def test_a_frozen_job_goes_on_where_it_was(llama: Served) -> None:
    llama.send(submit("still", tokens=200))
    await llama.ended("still")
    llama.send(submit("frozen", tokens=200))
    await llama.until(lambda: len(llama.tokens("frozen")) >= 10)
    llama.send(FreezeJob(JobId("frozen"), EPOCH))
    report = await llama.reported("frozen", JobPhase.FROZEN)
    assert report.next_index == len(llama.tokens("frozen")) < 200
    llama.send(ThawJob(JobId("frozen"), EPOCH))
    await llama.ended("frozen")
    assert llama.tokens("frozen") == llama.tokens("still")


@pytest.mark.parametrize("way", ["to vLLM", "from vLLM"])
async def test_a_job_moves_by_its_tokens_between_vllm_and_our_engine(
    llama: Served, zygote: Zygote, checkpoints: dict[str, TinyCheckpoint], way: str
) -> None:
    async with serving(zygote, checkpoints["LlamaConfig"], EngineKind.GEARFALL) as ours:
        source, target = (ours, llama) if way == "to vLLM" else (llama, ours)
        job, key = submit(way, tokens=400), (JobId(way), EPOCH)
        source.send(job)
        await source.until(lambda: len(source.tokens(way)) >= 10)
        target.send(HoldJob(submit(way, tokens=400, generated=source.tokens(way))))
        source.send(FreezeJob(*key))
        await source.reported(way, JobPhase.FROZEN)
        first = source.tokens(way)
        target.send(FeedJob(*key, 0, tuple(first)), ReleaseJob(*key))
        source.send(CancelJob(*key))
        await target.ended(way)
        rest = target.tokens(way)
    assert 10 <= len(first) < 400
    expected = rows(checkpoints["LlamaConfig"], [*PROMPT, *first, *rest])[len(PROMPT) - 1 : -1]
    assert expected.argmax(-1).tolist() == first + rest


async def test_nothing_of_a_killed_engine_is_left(
    zygote: Zygote, checkpoints: dict[str, TinyCheckpoint]
) -> None:
    async with serving(zygote, checkpoints["LlamaConfig"], EngineKind.VLLM) as served:
        below = descendants(served.engine.pid)
        assert below, "vLLM computes in processes of its own"
        held = [os.pidfd_open(pid) for pid in below]
    for descriptor in held:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        assert poller.poll(WAIT_S * 1000)
        os.close(descriptor)


async def test_a_worker_hears_that_vllm_died_while_it_was_asked_nothing(
    zygote: Zygote, checkpoints: dict[str, TinyCheckpoint]
) -> None:
    async with serving(zygote, checkpoints["LlamaConfig"], EngineKind.VLLM) as served:
        (core,) = (pid for pid in descendants(served.engine.pid) if "EngineCore" in name_of(pid))
        os.kill(core, 9)
        async with asyncio.timeout(WAIT_S):
            assert str(await served.engine.wait_exit()) == "exit code 1"


async def test_a_worker_hears_that_vllm_died(
    zygote: Zygote, checkpoints: dict[str, TinyCheckpoint]
) -> None:
    async with serving(zygote, checkpoints["LlamaConfig"], EngineKind.VLLM) as served:
        served.send(submit("cut", tokens=CONTEXT_TOKENS))
        await served.until(lambda: served.tokens("cut"))
        (core,) = (pid for pid in descendants(served.engine.pid) if "EngineCore" in name_of(pid))
        os.kill(core, 9)
        with pytest.raises(StopAsyncIteration):
            await served.until(lambda: False)
        await served.engine.wait_exit()
    assert not any(run.finish for run in served.runs["cut"])
